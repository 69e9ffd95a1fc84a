"""The runs behind reports/quality: a plan, a queue that runs it, and the records it leaves.

    python benchmarks/quality.py plan          # what is done, what comes next
    python benchmarks/quality.py run           # run it; Ctrl-C stops, the same command goes on

Two runs at a time, one thread each. A run that has its record in reports/quality/records is not
run again; one that was stopped goes on from its checkpoint. What comes next depends on what was
found, so the plan is made anew after each run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from factorlm.records import EvalRecord, EventRecord, RecordFile, RunRecord, StepRecord
from factorlm.train import TrainConfig, load_recipe
from factorlm.train.describe import describe
from factorlm.train.recipe import merge_sections

REPORT = Path("reports/quality")
RUNS = Path("runs/quality")
STEPS_KEPT = 30
"""Every so many step records are published; all evaluations are."""
SWEEP_EVAL_TOKENS = 262_144


_recipe = cache(load_recipe)


@dataclass(frozen=True)
class Run:
    """One run of the plan."""

    name: str
    recipe: str
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Section -> its fields, over the recipe's."""

    def config(self, folder: str) -> TrainConfig:
        """Its recipe as it is trained."""
        base = _recipe(Path(folder) / f"{self.recipe}.yaml").to_dict()
        return TrainConfig.from_dict(merge_sections(base, self.sections) | {"name": self.name})


class Plan:
    """What to run, given the losses of what was run."""

    def __init__(self, values: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        self.values = values
        self.losses = losses

    def runs(self) -> list[Run]:
        """Every run that is known to be needed so far, in the order to run them."""
        sweeps = [
            run for name, row in self.values["rows"].items() for run in self._sweep(name, row)
        ]
        everything = [*sweeps, *self._transfer(), *self._full()]
        return list({run.name: run for run in everything}.values())

    def pending(self) -> list[Run]:
        """Those without a record."""
        return [run for run in self.runs() if run.name not in self.losses]

    def _sweep(self, name: str, row: Mapping[str, Any]) -> Iterator[Run]:
        point = "T" if "structure" not in row and row["recipe"] == "dense" else "C"
        for rate in self._rates(name, row["rates"]):
            yield self._run(f"sweep-{name}-{rate:g}", row, rate, point, scale=self._share)

    def _rates(self, name: str, rates: list[float]) -> list[float]:
        """The grid of a row, extended by factors of two."""
        return extended(rates, 2.0, lambda rate: self.losses.get(f"sweep-{name}-{rate:g}"))

    def _full(self) -> Iterator[Run]:
        """All runs at the full number of tokens; first seeds first."""
        rows = self.values["full"].items()
        for seed in range(max([1, *(n for _, row in rows for n in row.get("seeds", {}).values())])):
            for name, entry in rows:
                row = self.values["rows"].get(entry.get("row"), {}) | entry
                rate, scale = float(row["rate"]), row.get("scale", 1)
                for point in row["points"]:
                    if seed < row.get("seeds", {}).get(point, 1):
                        run = f"{name}-{point}-s{seed}"
                        yield self._run(run, row, rate, point, seed=seed, scale=scale)

    def _transfer(self) -> Iterator[Run]:
        section = self.values["transfer"]
        for width in section["widths"]:
            prefix = f"transfer-{width}-"
            losses = {k.removeprefix(prefix): v for k, v in self.losses.items() if prefix in k}
            rates = extended(
                section["rates"], 2**0.5, lambda r, found=losses: found.get(f"{r:.4g}")
            )
            for seed in range(section.get("seeds", {}).get(width, 1)):
                for rate in rates:
                    yield self._transfer_run(width, rate, seed)

    def _transfer_run(self, width: int, rate: float, seed: int) -> Run:
        section = self.values["transfer"]
        overrides = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "head_dim": width // 4,
            "initializer_range": width**-0.5,
        }
        structure = {"structure": "low_rank", "rank": width // 4, **section["structure"]}
        sections = {
            "seed": seed,
            "model": {"overrides": overrides},
            "structure": structure,
            "optimizer": section["optimizer"] | {"learning_rate": rate},
            "batch": {"num_tokens": section["num_tokens"]},
            "eval": _sweep_eval(),
        }
        ending = f"-s{seed}" if seed else ""
        return Run(f"transfer-{width}-{rate:.4g}{ending}", section["recipe"], sections)

    @property
    def _share(self) -> float:
        return self.values["sweep_share"]

    def _path(self, name: str) -> Path:
        return Path(self.values["recipes"]) / f"{name}.yaml"

    def _run(
        self,
        name: str,
        row: Mapping[str, Any],
        rate: float,
        point: str,
        *,
        seed: int = 0,
        scale: float = 1,
    ) -> Run:
        tokens = round(_recipe(self._path("dense")).batch.num_tokens * scale)
        budget = {
            "flops": None if point in "TF" else self._budget(tokens),
            "count": "executed_flops",
        }
        sections: dict[str, Any] = {
            "seed": seed,
            "optimizer": row["optimizer"] | {"learning_rate": rate},
            "batch": row.get("batch", {}) | {"num_tokens": tokens},
            "budget": budget,
            "guide": row.get("guide", {}) | {"variant": "full" if point in "GF" else "none"},
        }
        sections |= {key: row[key] for key in ("structure", "model", "schedule") if key in row}
        if scale < 1:
            sections["eval"] = _sweep_eval()
        return Run(name, row["recipe"], sections)

    def _budget(self, tokens: int) -> float:
        """Executed FLOPs of the dense row that all rows are compared with."""
        row = self.values["rows"][self.values["budget_row"]]
        sections = {"optimizer": row["optimizer"], "batch": {"num_tokens": tokens}}
        key = (row["recipe"], tokens)
        if key not in _BUDGETS:
            run = Run("budget", row["recipe"], sections)
            described = describe(run.config(self.values["recipes"]))
            _BUDGETS[key] = float(described.training.executed_flops)
        return _BUDGETS[key]


_BUDGETS: dict[tuple[str, int], float] = {}


def extended(
    rates: Iterable[float], factor: float, loss_of: Callable[[float], float | None]
) -> list[float]:
    """The grid ``rates``, and on outward by ``factor`` until the best does not lie at an edge.

    Ends with the first rates whose loss is not known yet.
    """
    grid = sorted(float(rate) for rate in rates)
    while True:
        losses = [loss_of(rate) for rate in grid]
        if None in losses:
            return grid
        best = losses.index(min(loss for loss in losses if loss is not None))
        if best == 0:
            grid.insert(0, grid[0] / factor)
        elif best == len(grid) - 1:
            grid.append(grid[-1] * factor)
        else:
            return grid


def _sweep_eval() -> dict[str, Any]:
    tokens = SWEEP_EVAL_TOKENS
    return {"every_steps": None, "num_tokens": tokens, "final_num_tokens": tokens}


def load_plan() -> dict[str, Any]:
    """``plan.yaml``."""
    values: dict[str, Any] = yaml.safe_load((REPORT / "plan.yaml").read_text())
    return values


def load_losses() -> dict[str, float]:
    """Run -> its last validation loss, of the runs that have a record."""
    losses = {}
    for path in sorted((REPORT / "records").glob("*.jsonl")):
        evals = [r for r in RecordFile(path) if isinstance(r, EvalRecord)]
        if evals:
            losses[path.stem] = evals[-1].loss
    return losses


def publish(run: Run) -> None:
    """Copy what a finished run's records say, most steps left out, to the report."""
    kept = []
    for record in RecordFile(RUNS / run.name / "records.jsonl"):
        last = isinstance(record, StepRecord) and record.step % STEPS_KEPT == 0
        if last or isinstance(record, RunRecord | EvalRecord | EventRecord):
            kept.append(record.to_json() + "\n")
    path = REPORT / "records" / f"{run.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)


class Queue:
    """Runs what is pending, ``workers`` at a time."""

    def __init__(self, workers: int, hours: float, first: Sequence[str] = ()) -> None:
        self.workers = workers
        self.first = first
        self.deadline = time.monotonic() + 3600 * hours
        self.children: list[subprocess.Popen[bytes]] = []
        self.stopped = False

    def run(self) -> None:
        """Until nothing is pending, the time is over, or a signal comes."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, lambda *_: self.stop())
        RUNS.mkdir(parents=True, exist_ok=True)
        values = load_plan()
        running: dict[Future[int], Run] = {}
        failed: set[str] = set()
        with ThreadPoolExecutor(self.workers) as pool:
            while True:
                busy = {run.name for run in running.values()} | failed
                pending = [r for r in Plan(values, load_losses()).pending() if r.name not in busy]
                for run in sorted(pending, key=self._is_later)[: self.workers - len(running)]:
                    if not self.stopped and time.monotonic() < self.deadline:
                        print(f"{time.strftime('%H:%M:%S')} start {run.name}", flush=True)
                        running[pool.submit(self._train, run, values["recipes"])] = run
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, code = running.pop(future), future.result()
                    print(f"{time.strftime('%H:%M:%S')} end {run.name}: exit {code}", flush=True)
                    if code == 0:
                        publish(run)
                    else:
                        failed.add(run.name)

    def _is_later(self, run: Run) -> int:
        """Position of the first pattern that the run's name matches."""
        found = [i for i, pattern in enumerate(self.first) if fnmatch(run.name, pattern)]
        return found[0] if found else len(self.first)

    def _train(self, run: Run, recipes: str) -> int:
        """``factorlm train`` on the run's resolved recipe; its exit code."""
        recipe = RUNS / f"{run.name}.yaml"
        recipe.write_text(yaml.safe_dump(run.config(recipes).to_dict(), sort_keys=False))
        command = [sys.executable, "-m", "factorlm", "train", str(recipe), "--runs-dir", str(RUNS)]
        with (RUNS / f"{run.name}.log").open("ab") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            child = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, start_new_session=True
            )
            self.children.append(child)
            if self.stopped:  # in between: nothing has told this one
                child.send_signal(signal.SIGTERM)
            return child.wait()

    def stop(self) -> None:
        """Pass the signal on: runs end with a complete checkpoint."""
        self.stopped = True
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)


def show_plan() -> None:
    """Every run with its FLOPs and its loss, if it has one."""
    values, losses = load_plan(), load_losses()
    total = left = 0.0
    for run in Plan(values, losses).runs():
        flops = describe(run.config(values["recipes"])).training.executed_flops
        total += flops
        left += 0 if run.name in losses else flops
        print(f"{run.name:<40} {flops:.3e} {losses.get(run.name, '')}")
    print(f"known so far: {total:.3e} FLOPs, {left:.3e} of them to be run")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["plan", "run"])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--hours", type=float, default=1000.0, help="start no run after so long")
    parser.add_argument("--first", nargs="*", default=[], help="patterns of runs to bring forward")
    args = parser.parse_args()
    if args.command == "plan":
        show_plan()
    else:
        Queue(args.workers, args.hours, args.first).run()


if __name__ == "__main__":
    main()

"""Tables and pictures of reports/quality, from its records alone (no torch).

    python benchmarks/quality_report.py

Writes reports/quality/results.md and the pictures beside it; README.md there says what they mean.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from factorlm.records import EvalRecord, EventRecord, RecordFile, RunRecord

mpl.use("agg")
from matplotlib import pyplot as plt

REPORT = Path("reports/quality")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t at 95 %, by degrees of freedom."""
COLUMNS = ("T", "C", "G", "F")


@dataclass(frozen=True)
class Result:
    """One finished run."""

    name: str
    run: RunRecord
    loss: float
    """Last validation loss, nats per token."""


def load_results() -> dict[str, Result]:
    """Every record of a finished run, by the run's name."""
    results = {}
    for path in sorted((REPORT / "records").glob("*.jsonl")):
        records = list(RecordFile(path))
        run = next(r for r in records if isinstance(r, RunRecord))
        evals = [r for r in records if isinstance(r, EvalRecord)]
        if any(isinstance(r, EventRecord) and r.event == "finished" for r in records):
            results[path.stem] = Result(path.stem, run, evals[-1].loss)
    return results


def interval(losses: list[float]) -> str:
    """Mean and half width of the 95 % interval over seeds; one run has none."""
    mean = statistics.mean(losses)
    if len(losses) < 2:
        return f"{mean:.4f}"
    half = T_95[len(losses) - 1] * statistics.stdev(losses) / math.sqrt(len(losses))
    return f"{mean:.4f} ± {half:.4f} ({len(losses)})"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def step_times() -> Mapping[str, float]:
    """Row -> milliseconds of a step, as ``quality_steps.py`` measured it last; empty without it."""
    path = REPORT / "steps.jsonl"
    if not path.exists():
        return {}
    times: dict[str, float] = json.loads(path.read_text().splitlines()[-1])["median_step_ms"]
    return times


def minutes(result: Result, row: str, times: Mapping[str, float]) -> str:
    """Wall time of a run on one thread, from steps timed alone."""
    guided = result.run.num_guide_steps
    names = [row, f"{row} guided"] if guided else [row]
    if any(name not in times for name in names):
        return ""
    plain = (result.run.num_steps - guided) * times[row]
    return f"{(plain + guided * times.get(f'{row} guided', 0.0)) / 60000:.1f}"


def full_runs(results: Mapping[str, Result]) -> dict[str, dict[str, list[Result]]]:
    """Row -> point -> its results, by seed; rows from the best to the worst."""
    found: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for name, result in sorted(results.items()):
        head, dash, _ = name.rpartition("-s")
        row, _, point = head.rpartition("-")
        if dash and point in COLUMNS:
            found[row][point].append(result)
    return dict(sorted(found.items(), key=lambda item: min(map(mean_loss, item[1].values()))))


def is_longer(row: str) -> bool:
    """Whether a row has more tokens than the others, which no loss can be compared over."""
    return row.startswith("longer")


def mean_loss(results: list[Result]) -> float:
    return statistics.mean(result.loss for result in results)


def full_table(found: Mapping[str, Mapping[str, list[Result]]]) -> str:
    """Rows against points, over seeds."""
    times = step_times()
    rows = []
    for row, points in found.items():
        cells = [interval([r.loss for r in points[p]]) if p in points else "" for p in COLUMNS]
        last = list(points.values())[-1][0].run
        wall = [minutes(points[p][0], row, times) for p in COLUMNS if p in points]
        params = f"{last.num_non_embedding_params / 1e3:,.0f}"
        rate = f"{last.config['optimizer']['learning_rate']:g}"
        rows.append([row, rate, params, *cells, " / ".join(wall) if any(wall) else ""])
    return table(["row", "rate", "K params", *COLUMNS, "minutes, by point"], rows)


def spent_table(found: Mapping[str, Mapping[str, list[Result]]]) -> str:
    """Tokens and FLOPs of every point."""
    rows = []
    for row, points in found.items():
        for point, results in points.items():
            run = results[0].run
            tokens = run.num_steps * run.tokens_per_step / 1e6
            flops = [f"{run.training_flops:.3e}", f"{run.executed_flops or 0:.3e}"]
            guided = f"{run.num_guide_steps / run.num_steps:.3f}" if run.num_guide_steps else ""
            rows.append([f"{row}-{point}", f"{tokens:.2f}", guided, *flops])
    return table(["run", "M tokens", "guided steps", "model FLOPs", "executed FLOPs"], rows)


def difference_table(
    found: Mapping[str, Mapping[str, list[Result]]], against: str = "dense_rate8-T"
) -> str:
    """Every point minus the best dense run, over seeds that both have."""
    row, _, point = against.rpartition("-")
    base = {result.run.config["seed"]: result.loss for result in found[row][point]}
    rows = []
    for name, points in found.items():
        for column, results in points.items():
            if name != row and not is_longer(name):
                seeds = {r.run.config["seed"]: r.loss for r in results}
                pairs = [loss - base[seed] for seed, loss in seeds.items() if seed in base]
                rows.append((statistics.mean(pairs), f"{name}-{column}", interval(pairs)))
    return table(["run", f"nats over {against}"], [row[1:] for row in sorted(rows)])


def guidance_table(found: Mapping[str, Mapping[str, list[Result]]]) -> str:
    """Where G beats C: the difference of pairs with one seed."""
    rows = []
    for row, points in found.items():
        plain = {r.run.config["seed"]: r.loss for r in points.get("C", [])}
        pairs = [
            r.loss - plain[r.run.config["seed"]]
            for r in points.get("G", [])
            if r.run.config["seed"] in plain
        ]
        if pairs:
            rows.append([row, interval(pairs)])
    return table(["row", "G − C, nats"], rows)


def sweep_table(results: Mapping[str, Result]) -> tuple[str, dict[str, dict[float, float]]]:
    """Rows against learning rates."""
    sweeps: dict[str, dict[float, float]] = defaultdict(dict)
    for name, result in results.items():
        if name.startswith("sweep-"):
            row = name.removeprefix("sweep-").rpartition("-")[0]
            sweeps[row][result.run.config["optimizer"]["learning_rate"]] = result.loss
    rates = sorted({rate for found in sweeps.values() for rate in found})
    rows = []
    for row, found in sorted(sweeps.items()):
        best = min(found.values())
        cells = [f"{found[rate]:.4f}" if rate in found else "" for rate in rates]
        rows.append([row, *(f"**{c}**" if c == f"{best:.4f}" else c for c in cells)])
    return table(["row", *(f"{rate:g}" for rate in rates)], rows), sweeps


def transfer_curves(results: Mapping[str, Result]) -> dict[int, dict[float, float]]:
    """Width -> learning rate -> loss, the mean over seeds."""
    found: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, result in results.items():
        if name.startswith("transfer-"):
            rate = result.run.config["optimizer"]["learning_rate"]
            found[int(name.split("-")[1])][rate].append(result.loss)
    return {
        width: {rate: statistics.mean(losses) for rate, losses in points.items()}
        for width, points in sorted(found.items())
    }


def draw_curves(curves: Mapping[object, Mapping[float, float]], title: str, path: Path) -> None:
    """Loss against learning rate, one line a row."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, points in curves.items():
        rates = sorted(points)
        axes.plot(rates, [points[rate] for rate in rates], marker="o", label=str(name))
    axes.set_xscale("log", base=2)
    ticks = sorted({rate for points in curves.values() for rate in points})
    axes.set_xticks(ticks, [f"{rate:.3g}" for rate in ticks], rotation=45)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    results = load_results()
    sweeps, curves = sweep_table(results)
    parts = ["<!-- written by benchmarks/quality_report.py -->\n"]
    parts.append(f"# Results so far: {len(results)} runs\n")
    found = full_runs(results)
    longer = {row: points for row, points in found.items() if is_longer(row)}
    full = {row: points for row, points in found.items() if row not in longer}
    parts.append("## At the full number of tokens\n\n" + full_table(full) + "\n")
    if longer:
        parts.append("## With three times the tokens\n\n" + full_table(longer) + "\n")
    parts.append("## Against the best dense row\n\n" + difference_table(found) + "\n")
    parts.append("## What guidance wins\n\n" + guidance_table(found) + "\n")
    parts.append("## What each run spent\n\n" + spent_table(found) + "\n")
    parts.append("## Learning rates, at a quarter of the tokens\n\n" + sweeps + "\n")
    if curves:
        draw_curves(curves, "Tuning at a quarter of the tokens", REPORT / "sweeps.png")
        parts.append("![Loss against learning rate](sweeps.png)\n")
    transfer = transfer_curves(results)
    if transfer:
        rates = sorted({rate for points in transfer.values() for rate in points})
        rows = [
            [str(width), *(f"{points[rate]:.4f}" if rate in points else "" for rate in rates)]
            for width, points in transfer.items()
        ]
        header = ["width", *(f"{rate:g}" for rate in rates)]
        parts.append("## The best rate against the width\n\n" + table(header, rows) + "\n")
        title = "low_rank, structure-aware AdamW, 1M tokens, by width"
        draw_curves(transfer, title, REPORT / "transfer.png")
        parts.append("![Loss against learning rate by width](transfer.png)\n")
    (REPORT / "results.md").write_text("\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    main()

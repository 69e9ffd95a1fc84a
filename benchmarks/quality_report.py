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
COLUMNS = ("T", "C", "G")


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


def full_table(results: Mapping[str, Result]) -> str:
    """Rows against points, over seeds."""
    found: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for name, result in results.items():
        head, dash, _ = name.rpartition("-s")
        row, _, point = head.rpartition("-")
        if dash and point in COLUMNS:
            found[row][point].append(result)
    times = step_times()
    rows = []
    for row, points in sorted(found.items()):
        cells = [interval([r.loss for r in points[p]]) if p in points else "" for p in COLUMNS]
        last = points.get("G") or points.get("C") or points["T"]
        flops = f"{last[0].run.executed_flops or 0:.3e}"
        wall = [minutes(points[p][0], row, times) if p in points else "" for p in COLUMNS]
        rate = f"{last[0].run.config['optimizer']['learning_rate']:g}"
        rows.append([row, rate, *cells, flops, " / ".join(wall) if any(wall) else ""])
    header = ["row", "rate", *COLUMNS, "executed FLOPs of the last", "minutes T / C / G"]
    return table(header, rows)


def explored_table(results: Mapping[str, Result]) -> str:
    """What else was tried, from the best to the worst."""
    found = [r for name, r in results.items() if name.startswith(("explore-", "longer-"))]
    rows = []
    for result in sorted(found, key=lambda r: (r.name.split("-")[0], r.loss)):
        run, config = result.run, result.run.config
        rows.append(
            [
                result.name,
                f"{config['optimizer']['learning_rate']:g}",
                f"{run.num_non_embedding_params / 1e3:,.0f}",
                f"{run.num_steps * run.tokens_per_step / 1e6:.2f}",
                f"{run.executed_flops or 0:.3e}",
                f"{result.loss:.4f}",
            ]
        )
    header = ["run", "rate", "K parameters beside the embedding", "M tokens"]
    return table([*header, "executed FLOPs", "loss"], rows)


def guidance_table(results: Mapping[str, Result]) -> str:
    """Where G beats C: the difference of pairs with one seed."""
    pairs: dict[str, list[float]] = defaultdict(list)
    for name, result in results.items():
        other = results.get(name.replace("-C", "-G"))
        if "-C" in name and other is not None:
            row = name.partition("-C")[0]
            pairs[row].append(other.loss - result.loss)
    return table(
        ["row", "G − C, nats"], [[row, interval(found)] for row, found in sorted(pairs.items())]
    )


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
    """Width -> learning rate -> loss."""
    curves: dict[int, dict[float, float]] = defaultdict(dict)
    for name, result in results.items():
        if name.startswith("transfer-"):
            _, width, _ = name.split("-", 2)
            curves[int(width)][result.run.config["optimizer"]["learning_rate"]] = result.loss
    return dict(sorted(curves.items()))


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
    parts.append("## At the full number of tokens\n\n" + full_table(results) + "\n")
    if any(name.startswith(("explore-", "longer-")) for name in results):
        parts.append("## What else was tried\n\n" + explored_table(results) + "\n")
    if any("-G" in name for name in results):
        parts.append("## What guidance wins\n\n" + guidance_table(results) + "\n")
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

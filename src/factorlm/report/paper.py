"""The page's charts as PNG and SVG for papers, in the one style of all pictures here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factorlm.errors import ConfigError
from factorlm.records import BenchmarkRecord
from factorlm.report.curves import LossCurve
from factorlm.report.figures import COLORS, LEGEND_CHARACTERS, save_picture, time_unit
from factorlm.report.monitors import plot_monitors
from factorlm.report.payload import NO_FITS, ScalingCurve, ScalingFits
from factorlm.report.points import MAIN, TUNE, stage_of
from factorlm.report.reading import Report, ReportRun
from factorlm.report.speed import check_lines, plot_speed, speed_groups
from factorlm.report.tables import format_power
from factorlm.storage import storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
"""Of families that have the same colour."""
MARKERS = ("o", "s", "D")
TUNING_MARKER = "x"
"""Of runs that only find a rate, and are in no fit."""
RUNS_A_PICTURE = 6
"""Rows of one picture of monitors."""
BAND_ALPHA = 0.2
LEGEND_ROW = 0.2
"""Inches that a row of the legend adds to a picture."""
FLOPS_OF_PAPERS = ("training_flops", "FLOPs, papers' convention")


def write_figures(
    report: Report, folder: str | os.PathLike[str], fits: ScalingFits = NO_FITS
) -> list[str]:
    """Write ``curves``, ``scaling``, ``speed`` and ``monitors_1``, ... as .png and .svg.

    The picture of scaling has the first law of ``fits``. Returns a line for each: where it is, and
    what could not be drawn. Raises ``ConfigError`` where matplotlib is missing and
    ``StorageError`` where ``folder`` cannot be written.
    """
    folder = Path(folder)
    with storage_errors(folder, verb="make"):
        folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, save in _pictures(report, fits):
        for kind in KINDS:
            save(folder / f"{name}{kind}")
        lines.append(f"{folder / name}{' and '.join(KINDS)}")
    return [*lines, *_not_drawn(report)]


def _pictures(report: Report, fits: ScalingFits) -> Iterator[tuple[str, Callable[[Path], Path]]]:
    if report.runs:
        yield "curves", partial(save_picture, partial(_draw_curves, report))
        yield "scaling", partial(save_picture, partial(_draw_scaling, report, first_law(fits)))
    drawable = [
        record
        for found in speed_groups(report.benchmarks).values()
        if _refusal(found) is None
        for record in found
    ]
    if drawable:
        yield "speed", partial(plot_speed, drawable)
    monitored = [run.summary for run in report.runs if run.summary.monitors]
    for start in range(0, len(monitored), RUNS_A_PICTURE):
        rows = monitored[start : start + RUNS_A_PICTURE]
        yield f"monitors_{start // RUNS_A_PICTURE + 1}", partial(plot_monitors, rows)


def _not_drawn(report: Report) -> Iterator[str]:
    for key, found in speed_groups(report.benchmarks).items():
        reason = _refusal(found)
        if reason is not None:
            yield f"not in the picture of speed: {', '.join(key)}: {reason}"


def _refusal(records: Sequence[BenchmarkRecord]) -> str | None:
    try:
        check_lines(records)
    except ConfigError as error:
        return str(error)
    return None


def _draw_curves(report: Report) -> Figure:
    """Losses of evaluations, dark, over smoothed training losses, light."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.06})
    unit, size = time_unit(max(float(run.training.seconds[-1]) for run in report.runs))
    has_executed = all(run.metrics["executed_flops"] is not None for run in report.runs)
    flops = ("executed_flops", "FLOPs as run") if has_executed else FLOPS_OF_PAPERS
    axes_of = (("num_tokens", "tokens", 1.0), (*flops, 1.0), ("seconds", f"time ({unit})", size))
    for axes, (name, label, divisor) in zip(panels, axes_of, strict=True):
        for run in report.runs:
            look = _look(report.families, run.family)
            for curve, values, style in _lines(run):
                axes.plot(getattr(curve, name) / divisor, values, **look, **style)
        axes.set(xscale="log", xlabel=label)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_ylim(*_limits(report.runs))
    _legend(figure, report.families)
    return figure


def _lines(run: ReportRun) -> Iterator[tuple[LossCurve, np.ndarray, dict[str, Any]]]:
    training, validation = run.training, run.validation
    yield training, training.smoothed, {"alpha": 0.3, "lw": 1.0, "zorder": 1.9}
    marker = {"marker": "o", "ms": 3.0} if len(validation.loss) <= 25 else {}
    yield validation, validation.loss, {"lw": 1.5, **marker}


def _limits(runs: Sequence[ReportRun]) -> tuple[float, float]:
    """Around the losses of the evaluations, of the training where there is none."""
    evaluated = [run.validation.loss for run in runs if len(run.validation.loss)]
    losses = np.concatenate(evaluated or [run.training.smoothed for run in runs])
    losses = losses[np.isfinite(losses)]
    low, high = (losses.min(), losses.max()) if len(losses) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def _draw_scaling(report: Report, laws: Sequence[ScalingCurve]) -> Figure:
    """Last validation loss against executed FLOPs, both logarithmic, under the fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    names = tuple(dict.fromkeys([*report.families, *(law.family for law in laws)]))
    for run in report.runs:
        look = _look(names, run.family)
        flops, loss = run.metrics["executed_flops"], run.metrics["last_validation_loss"]
        if flops is not None and loss is not None and stage_of(run) in (MAIN, TUNE):
            face = look["color"] if run.summary.is_finished else "none"
            marker = TUNING_MARKER if stage_of(run) == TUNE else _marker(names, run.family)
            axes.plot(flops, loss, marker, color=look["color"], mfc=face, ms=5.5)
    for law in laws:
        look = _look(names, law.family)
        axes.plot(law.compute, law.loss, lw=1.5, **look)
        if law.low:
            axes.fill_between(
                law.compute, law.low, law.high, color=look["color"], alpha=BAND_ALPHA, lw=0
            )
    _finish_scaling(axes)
    if laws:
        axes.set_title(laws[0].law, loc="left", fontsize=9)
    _legend(figure, names, has_markers=True)
    return figure


def first_law(fits: ScalingFits) -> list[ScalingCurve]:
    """The curves of the law that is drawn where there is no choice."""
    return [curve for curve in fits.curves if curve.law == fits.laws[0]]


def _finish_scaling(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="executed FLOPs", ylabel="last validation loss (nats per token)")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _look(families: Sequence[str], family: str) -> dict[str, Any]:
    index = families.index(family)
    return {
        "color": COLORS[index % len(COLORS)],
        "ls": DASHES[index // len(COLORS) % len(DASHES)],
    }


def _marker(families: Sequence[str], family: str) -> str:
    return MARKERS[families.index(family) // len(COLORS) % len(MARKERS)]


def _legend(figure: Figure, families: Sequence[str], *, has_markers: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            lw=2,
            label=name,
            marker=_marker(families, name) if has_markers else None,
            **_look(families, name),
        )
        for name in families
    ]
    longest = max(len(name) for name in families)
    width = LEGEND_CHARACTERS * figure.get_figwidth() / 12
    columns = min(len(handles), max(1, int(width // (longest + 7))))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=8)

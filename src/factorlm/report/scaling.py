"""Fitted scaling laws as tables and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorlm.report.figures import COLORS, save_picture
from factorlm.report.payload import ScalingCurve
from factorlm.report.tables import Table, format_power, format_scientific
from factorlm.scaling import (
    Comparison,
    HeldOut,
    LineFit,
    PowerLawFit,
    SlopeDifference,
    fit_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Families = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name to (training FLOPs, loss in nats), each (num_points,)."""
NUM_PLACES = 60
"""Of one drawn line."""


def between(low: float, high: float, decimals: int = 4) -> str:
    """``-0.0076 to +0.0023``."""
    return f"{low:+.{decimals}f} to {high:+.{decimals}f}"


def chance(p_value: float) -> str:
    """``0.24``, ``0.003``, ``< 0.001``."""
    if math.isnan(p_value):
        return "not known"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.{2 if p_value >= 0.01 else 3}f}"


def percent(level: float) -> str:
    """``95 %``."""
    return f"{100 * level:g} %"


def lines_table(
    lines: Mapping[str, LineFit], comparisons: Mapping[str, Comparison], base: str
) -> Table:
    """A row a family: its slope in log–log, how it differs from ``base``, and why."""
    level = percent(lines[base].level)
    header = ["family", "slope", level]
    if comparisons:
        header += [f"less {base}", level, "p", "by FLOPs", "by loss gap", level]
    rows = [_line_row(name, line, comparisons.get(name)) for name, line in lines.items()]
    return Table(
        header=tuple(header),
        rows=tuple((*row, *[""] * (len(header) - len(row))) for row in rows),
    )


def _line_row(name: str, line: LineFit, comparison: Comparison | None) -> tuple[str, ...]:
    width = line.slope_high - line.slope
    row: tuple[str, ...]
    row = (name, f"{line.slope:.4f}", f"± {width:.4f}" if math.isfinite(width) else "not known")
    if comparison is None:
        return row
    slopes, split = comparison.slopes, comparison.split
    difference = between(slopes.low, slopes.high)
    row = (*row, f"{slopes.difference:+.4f}", difference, chance(slopes.p_value))
    if split is None:
        return row
    gap = between(split.gap_part_low, split.gap_part_high)
    return (*row, f"{split.flops_part:+.4f}", f"{split.gap_part:+.4f}", gap)


def gamma_table(
    over: Sequence[Mapping[str, PowerLawFit]], fitted: Mapping[str, PowerLawFit], loss: float
) -> Table:
    """A row for each shared E, and one for the fitted one: γ of every family with its interval,
    and its local slope d log(loss) / d log(FLOPs) at ``loss``."""
    first = next(iter(fitted.values()))
    header = ["shared E"]
    for name in fitted:
        header += [f"γ {name}", percent(first.level), f"slope at {loss:.2f}"]
    rows = []
    for laws, mark in [*((laws, "") for laws in over), (fitted, ", fitted")]:
        row = [f"{next(iter(laws.values())).E:.2f}{mark}"]
        for law in laws.values():
            interval = f"{law.gamma_low:.4f} to {law.gamma_high:.4f}"
            row += [f"{law.gamma:.4f}", interval, f"{law.local_slope(loss):.4f}"]
        rows.append(tuple(row))
    return Table(header=tuple(header), rows=tuple(rows))


def entropy_table(
    over: Mapping[str, Sequence[SlopeDifference]], fitted: Mapping[str, SlopeDifference], base: str
) -> Table:
    """A row for each shared E, and one for the fitted one: local slopes less that of ``base``."""
    names = list(over)
    level = percent(over[names[0]][0].level)
    header = ["shared E", *(title for name in names for title in (f"{name} less {base}", level))]
    rows = []
    lines = [*zip(*over.values(), strict=True), tuple(fitted[name] for name in names)]
    for slopes in lines:
        row = [f"{slopes[0].E:.2f}" + (", fitted" if slopes is lines[-1] else "")]
        for found in slopes:
            row += [f"{found.difference:+.4f}", between(found.low, found.high)]
        rows.append(tuple(row))
    return Table(header=tuple(header), rows=tuple(rows))


def slopes_of(comparisons: Mapping[str, Comparison]) -> dict[str, SlopeDifference]:
    """The slope difference of each."""
    return {name: comparison.slopes for name, comparison in comparisons.items()}


def multiplier_table(comparison: Comparison) -> Table:
    """A row a loss: the FLOPs of both families and their ratio."""
    level = percent(comparison.slopes.level)
    header = ("loss", comparison.base, comparison.other, "compute multiplier", level)
    rows = [
        (
            f"{found.loss:.3f}",
            format_scientific(found.base_flops),
            format_scientific(found.other_flops),
            f"{found.multiplier:.2f}",
            f"{found.multiplier_low:.2f} to {found.multiplier_high:.2f}",
        )
        for found in comparison.multipliers
    ]
    return Table(header=header, rows=tuple(rows))


def held_out_table(by_law: Mapping[str, Mapping[str, HeldOut]]) -> Table:
    """A row a family: its largest size, and what each law makes of it from the smaller ones."""
    laws = list(by_law)
    header = ["family", "largest, FLOPs", "loss"]
    for law in laws:
        header += [law, "error"]
    rows = []
    for family, first in by_law[laws[0]].items():
        row = [family, format_scientific(first.size), f"{first.measured:.4f}"]
        for law in laws:
            found = by_law[law][family]
            row += [f"{found.predicted:.4f}", f"{100 * found.error:+.2f} %"]
        rows.append(tuple(row))
    return Table(header=tuple(header), rows=tuple(rows))


def plot_scaling(
    families: Families,
    base: str,
    path: str | os.PathLike[str],
    *,
    over: Mapping[str, Sequence[SlopeDifference]],
    laws: Sequence[ScalingCurve] = (),
    level: float = 0.95,
    xlabel: str = "training FLOPs",
) -> Path:
    """Loss against FLOPs with straight lines and their bands; beside it ``laws`` over the same
    points, and who is steeper at which E, where there are any.

    ``over`` is what ``slopes_over_entropy`` found. Written to ``path`` in the format of its suffix;
    errors are those of ``plot_losses`` and of ``fit_line``.
    """
    lines = {name: fit_line(*points, level=level) for name, points in families.items()}
    return save_picture(lambda: _draw(families, lines, over, base, laws, xlabel), path)


def _draw(
    families: Families,
    lines: Mapping[str, LineFit],
    over: Mapping[str, Sequence[SlopeDifference]],
    base: str,
    laws: Sequence[ScalingCurve] = (),
    xlabel: str = "training FLOPs",
) -> Figure:
    from matplotlib.figure import Figure

    count = 1 + bool(laws) + bool(over)
    figure = Figure(figsize=(5.5 * count, 4.6), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.06})[0])
    colors = dict(zip(families, _cycle(len(families)), strict=True))
    level = percent(next(iter(lines.values())).level)
    for name, points in families.items():
        _draw_family(panels[0], name, points, lines[name], colors[name])
    panels[0].set_title(f"straight lines in log–log (bands: {level})", loc="left", fontsize=10)
    if laws:
        for law in laws:
            _draw_law(panels[1], law, families[law.family], colors[law.family])
        panels[1].set_title(f"E + A·C^−γ, shared E (bands: {level})", loc="left", fontsize=10)
    losses = np.concatenate([loss for _, loss in families.values()])
    for axes in panels[: 1 + bool(laws)]:
        _finish_loss(axes, losses, xlabel)
    if over:
        _draw_all_differences(panels[-1], over, colors, base, level)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(2 * count, len(labels)))
    return figure


def _cycle(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _draw_family(
    axes: Axes, name: str, points: tuple[np.ndarray, np.ndarray], line: LineFit, color: str
) -> None:
    compute, loss = points
    places = np.geomspace(compute.min() / 1.3, compute.max() * 1.3, NUM_PLACES)
    low, high = line.band(places)
    axes.plot(places, line.predict(places), color=color, lw=1.4)
    if line.degrees_of_freedom:
        axes.fill_between(places, low, high, color=color, alpha=0.08, lw=0)
        for end in (low, high):
            axes.plot(places, end, color=color, lw=0.7, ls="--", alpha=0.7)
    width = line.slope_high - line.slope
    label = f"{name}: slope {line.slope:.4f}" + (f" ± {width:.4f}" if math.isfinite(width) else "")
    axes.plot(compute, loss, color=color, ls="", marker="o", ms=5, label=label)


def _draw_law(
    axes: Axes, law: ScalingCurve, points: tuple[np.ndarray, np.ndarray], color: str
) -> None:
    axes.plot(law.compute, law.loss, color=color, lw=1.4)
    axes.fill_between(law.compute, law.low, law.high, color=color, alpha=0.15, lw=0)
    axes.plot(*points, color=color, ls="", marker="o", ms=5)


def _finish_loss(axes: Axes, loss: np.ndarray, xlabel: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("validation loss (nats per token)")
    step = 0.2 if np.ptp(loss) < 2 else 0.5
    ticks = np.arange(np.floor(loss.min() / step), np.ceil(loss.max() / step) + 1) * step
    axes.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1f}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    axes.set_ylim(loss.min() * 0.975, loss.max() * 1.025)


def _draw_all_differences(
    axes: Axes,
    over: Mapping[str, Sequence[SlopeDifference]],
    colors: Mapping[str, str],
    base: str,
    level: str,
) -> None:
    for name, slopes in over.items():
        _draw_differences(axes, slopes, colors[name])
    axes.axhline(0, color="#666666", lw=1)
    axes.set_xlabel("shared entropy E (nats)")
    axes.set_ylabel(f"slope less that of {base}")
    axes.set_title(f"below 0: steeper than {base} (bands: {level})", loc="left", fontsize=10)


def _draw_differences(axes: Axes, slopes: Sequence[SlopeDifference], color: str) -> None:
    entropies = [found.E for found in slopes]
    axes.plot(entropies, [found.difference for found in slopes], color=color, lw=1.6)
    low, high = [found.low for found in slopes], [found.high for found in slopes]
    axes.fill_between(entropies, low, high, color=color, alpha=0.10, lw=0)
    for end in (low, high):
        axes.plot(entropies, end, color=color, lw=0.9, ls="--")

"""Fitted scaling laws as tables and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorlm.report.figures import COLORS, save_picture
from factorlm.report.tables import Table, format_power, format_scientific
from factorlm.scaling import (
    Comparison,
    HeldOut,
    LineFit,
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


def percent(level: float) -> str:
    """``95 %``."""
    return f"{100 * level:g} %"


def lines_table(
    lines: Mapping[str, LineFit], comparisons: Mapping[str, Comparison], base: str
) -> Table:
    """A row a family: its slope in log–log, how it differs from ``base``, and why."""
    level = percent(lines[base].level)
    header = (
        "family",
        "slope",
        level,
        f"less {base}",
        level,
        "p",
        "by FLOPs",
        "by loss gap",
        level,
    )
    rows = [_line_row(name, line, comparisons.get(name)) for name, line in lines.items()]
    return Table(header=header, rows=tuple(rows))


def _line_row(name: str, line: LineFit, comparison: Comparison | None) -> tuple[str, ...]:
    row = [name, f"{line.slope:.4f}", f"± {line.slope_high - line.slope:.4f}"]
    if comparison is None:
        return (*row, *[""] * 6)
    slopes, split = comparison.slopes, comparison.split
    row += [f"{slopes.difference:+.4f}", between(slopes.low, slopes.high), f"{slopes.p_value:.2f}"]
    if split is None:
        return (*row, *[""] * 3)
    gap = between(split.gap_part_low, split.gap_part_high)
    return (*row, f"{split.flops_part:+.4f}", f"{split.gap_part:+.4f}", gap)


def entropy_table(over: Mapping[str, Sequence[SlopeDifference]], base: str) -> Table:
    """A row for each shared E: γ of every family, and slopes less that of ``base``."""
    names = list(over)
    level = percent(over[names[0]][0].level)
    differences = [title for name in names for title in (f"{name} less {base}", level)]
    rows = []
    for slopes in zip(*over.values(), strict=True):
        row = [f"{slopes[0].E:.2f}", f"{slopes[0].base_gamma:.4f}"]
        row += [f"{found.other_gamma:.4f}" for found in slopes]
        for found in slopes:
            row += [f"{found.difference:+.4f}", between(found.low, found.high)]
        rows.append(tuple(row))
    gammas = [f"γ {name}" for name in (base, *names)]
    return Table(header=("shared E", *gammas, *differences), rows=tuple(rows))


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
) -> Path:
    """Loss against FLOPs with straight lines and their bands; beside it, who is steeper at which E.

    ``over`` is what ``slopes_over_entropy`` found. Written to ``path`` in the format of its suffix;
    errors are those of ``plot_losses`` and of ``fit_line``.
    """
    level = next(iter(over.values()))[0].level
    lines = {name: fit_line(*points, level=level) for name, points in families.items()}
    return save_picture(lambda: _draw(families, lines, over, base), path)


def _draw(
    families: Families,
    lines: Mapping[str, LineFit],
    over: Mapping[str, Sequence[SlopeDifference]],
    base: str,
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    colors = dict(zip(families, _cycle(len(families)), strict=True))
    for name, points in families.items():
        _draw_family(left, name, points, lines[name], colors[name])
    _finish_loss(left, np.concatenate([loss for _, loss in families.values()]))
    for name, slopes in over.items():
        _draw_differences(right, slopes, colors[name])
    right.axhline(0, color="#666666", lw=1)
    right.set_xlabel("shared entropy E (nats)")
    right.set_ylabel(f"slope less that of {base}")
    level = percent(next(iter(lines.values())).level)
    right.set_title(f"below 0: steeper than {base} (bands: {level})", loc="left", fontsize=10)
    left.set_title(f"straight lines in log–log (bands: {level})", loc="left", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
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


def _finish_loss(axes: Axes, loss: np.ndarray) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("validation loss (nats per token)")
    step = 0.2 if np.ptp(loss) < 2 else 0.5
    ticks = np.arange(np.floor(loss.min() / step), np.ceil(loss.max() / step) + 1) * step
    axes.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1f}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    axes.set_ylim(loss.min() * 0.975, loss.max() * 1.025)


def _draw_differences(axes: Axes, slopes: Sequence[SlopeDifference], color: str) -> None:
    entropies = [found.E for found in slopes]
    axes.plot(entropies, [found.difference for found in slopes], color=color, lw=1.6)
    low, high = [found.low for found in slopes], [found.high for found in slopes]
    axes.fill_between(entropies, low, high, color=color, alpha=0.10, lw=0)
    for end in (low, high):
        axes.plot(entropies, end, color=color, lw=0.9, ls="--")

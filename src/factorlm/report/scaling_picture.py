"""Points of scaling laws with lines, laws and bands, and who is steeper at which entropy."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorlm.report.figures import COLORS, save_picture
from factorlm.report.payload import ScalingCurve
from factorlm.report.scaling import percent
from factorlm.report.tables import format_power
from factorlm.scaling import LineFit, SlopeDifference
from factorlm.scaling.fit.data import Families

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_PLACES = 60
"""Of one drawn line."""


def plot_scaling(
    families: Families,
    base: str,
    path: str | os.PathLike[str],
    *,
    lines: Mapping[str, LineFit],
    over: Mapping[str, Sequence[SlopeDifference]],
    laws: Sequence[ScalingCurve] = (),
    xlabel: str = "training FLOPs",
) -> Path:
    """Loss against FLOPs with ``lines`` and their bands; beside it ``laws`` over the same points,
    and who is steeper at which E, where there are any.

    ``over`` is what ``slopes_over_entropy`` found. Written to ``path`` in the format of its suffix;
    errors are those of ``plot_losses``.
    """
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

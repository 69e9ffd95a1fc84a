"""Loss over model sizes at each budget, with the fitted law of parameters and tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorlm.report.figures import COLORS, save_picture
from factorlm.report.fits import Budget
from factorlm.report.points import FamilyPoints, Point
from factorlm.report.tables import format_scientific, format_tick
from factorlm.scaling import ChinchillaFit
from factorlm.scaling.fit.data import SAME_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_PLACES = 60
"""Of one drawn curve."""
MARGIN = 1.5
"""A curve goes so many times beyond its points."""


def plot_iso_flops(
    family: FamilyPoints, fit: ChinchillaFit, budget: Budget, path: str | os.PathLike[str]
) -> Path:
    """A colour a budget: points, the law at these FLOPs, a star where it is lowest, its interval.

    Written to ``path`` in the format of its suffix; errors are those of ``plot_losses``.
    """
    return save_picture(lambda: _draw(family, fit, budget.flops_per_param_and_token), path)


def budgets_of(family: FamilyPoints) -> list[list[Point]]:
    """Points of nearly equal FLOPs together, in order of FLOPs."""
    groups: list[list[Point]] = []
    for point in family.points:
        if not groups or point.flops > SAME_SIZE * groups[-1][0].flops:
            groups.append([])
        groups[-1].append(point)
    return groups


def _draw(family: FamilyPoints, fit: ChinchillaFit, ratio: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, points in enumerate(budgets_of(family)):
        _draw_budget(axes, points, fit, ratio, COLORS[index % len(COLORS)])
    axes.set(xscale="log", xlabel="parameters", ylabel="last validation loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axes.set_title(f"{family.name}: E + A·N^−α + B·D^−β", loc="left", fontsize=9)
    figure.legend(loc="outside right upper", title="FLOPs", fontsize=8)
    return figure


def _draw_budget(
    axes: Axes, points: list[Point], fit: ChinchillaFit, ratio: float, color: str
) -> None:
    flops = float(np.mean([point.flops for point in points]))
    params = [point.num_params for point in points for _ in point.losses]
    losses = [loss for point in points for loss in point.losses]
    places = np.geomspace(min(params) / MARGIN, max(params) * MARGIN, NUM_PLACES)
    axes.plot(places, fit.predict(places, flops / (ratio * places)), color=color, lw=1.4)
    axes.plot(params, losses, color=color, ls="", marker="o", ms=5, label=format_scientific(flops))
    best = fit.optimal_size(flops, flops_per_param_and_token=ratio)
    ends = np.clip([best.num_params_low, best.num_params_high], places[0], places[-1])
    axes.plot(ends, [best.loss, best.loss], color=color, lw=4, alpha=0.3)
    axes.plot(best.num_params, best.loss, color=color, marker="*", ms=11, mec="white")

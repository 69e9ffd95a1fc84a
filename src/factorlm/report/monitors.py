"""The picture of monitors: norms of factors, changes of products, the guide's share, over steps."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factorlm.config import check
from factorlm.records import LayerValues
from factorlm.report.compare import RunSummary
from factorlm.report.figures import COLORS, MAX_POINTS, save_picture
from factorlm.report.tables import format_tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))
"""One for each linear of a decoder layer."""
COLOR_MAP, LIGHTEST = "viridis_r", 0.15
"""From the first decoder layer to the last; the map's first colours are too light for lines."""
SPIKE_COLOR = COLORS[1]
MAX_TICKS = 8
"""Of the colour bar."""


@dataclass(frozen=True)
class Panel:
    """A quantity of every layer."""

    label: str
    value: Callable[[LayerValues], float | None]
    is_log: bool = False


def plot_monitors(runs: Sequence[RunSummary], path: str | os.PathLike[str]) -> Path:
    """A row for each of ``runs`` that has monitor records, written to ``path``.

    Each line is a layer: its colour says in which decoder layer it is, its dashes which linear.
    Upright lines are loss spikes. Raises ``ConfigError`` if there is nothing to draw, for another
    suffix than those of ``plot_losses``, and where matplotlib is missing.
    """
    monitored = [run for run in runs if run.monitors]
    check(bool(monitored), "no run has monitor records: train with monitor.every_steps")
    return save_picture(lambda: _draw(monitored), path)


def _draw(runs: Sequence[RunSummary]) -> Figure:
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(name for run in runs for name in run.monitors[-1].layers))
    linears = list(dict.fromkeys(_linear(name) for name in layers))
    dash_of = {linear: DASHES[i % len(DASHES)] for i, linear in enumerate(linears)}
    color_of = _colors(layers)
    rows = [panels_of(run) for run in runs]
    guided = [any(record.guide_alpha is not None for record in run.monitors) for run in runs]
    num_columns = max(map(len, rows)) + any(guided)
    figure = Figure(figsize=(3.6 * num_columns + 0.8, 2.7 * len(runs) + 0.7), layout="constrained")
    grid = figure.subplots(len(runs), num_columns, squeeze=False)
    for axes, run, panels, has_guide in zip(grid, runs, rows, guided, strict=True):
        for place, panel in zip(axes, panels, strict=False):
            _draw_layers(place, panel, run, color_of, dash_of)
        if has_guide:
            _draw_alpha(axes[-1], run)
        for empty in axes[len(panels) : num_columns - has_guide]:
            empty.set_visible(False)
        axes[0].set_title(run.label, loc="left", fontsize=10, fontweight="bold")
    _color_bar(figure, grid, color_of)
    _legend(figure, dash_of, any(run.spikes for run in runs))
    return figure


def panels_of(run: RunSummary) -> list[Panel]:
    """One for each place of a factor in the order of application, one for the change."""
    factors = [list(layer["factor_norms"]) for layer in run.monitors[-1].layers.values()]
    panels = []
    for place in range(max(map(len, factors))):
        names = dict.fromkeys(names[place] for names in factors if len(names) > place)
        label = f"spectral norm of {' or '.join(names)}"
        panels.append(Panel(label, partial(_norm, place=place)))
    return [*panels, Panel("RMS of change / RMS of product", _relative_change, is_log=True)]


def _norm(layer: LayerValues, *, place: int) -> float | None:
    norms = list(layer["factor_norms"].values())
    return norms[place] if place < len(norms) else None


def _relative_change(layer: LayerValues) -> float | None:
    return layer["change_rms"] / layer["product_rms"] if layer["product_rms"] else None


def _draw_layers(
    axes: Axes,
    panel: Panel,
    run: RunSummary,
    color_of: Mapping[int, Any],
    dash_of: Mapping[str, Any],
) -> None:
    records = run.monitors[:: -(-len(run.monitors) // MAX_POINTS)]
    for name in run.monitors[-1].layers:
        points = [(r.step, panel.value(r.layers[name])) for r in records if name in r.layers]
        steps, values = zip(*points, strict=True)
        style = {"color": color_of[_depth(name)], "ls": dash_of[_linear(name)]}
        axes.plot(steps, np.array(values, dtype=float), lw=1.3, **style)  # None becomes a gap
    if panel.is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _label(axes, panel.label, run)


def _draw_alpha(axes: Axes, run: RunSummary) -> None:
    """Of every step, which the records of steps have; 0 where there is no guide."""
    steps = run.steps[:: -(-len(run.steps) // MAX_POINTS)]
    alphas = [step.guide_alpha or 0.0 for step in steps]
    axes.plot([step.step for step in steps], alphas, color=COLORS[0], lw=1.6)
    axes.set_ylim(-0.03, 1.03)
    _label(axes, "share of the guide, α", run)


def _label(axes: Axes, label: str, run: RunSummary) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_ylabel(label)
    axes.set_xlabel("step")
    axes.set_xlim(0, run.steps[-1].step)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    for event in run.spikes:
        axes.axvline(event.step, color=SPIKE_COLOR, lw=1.0, alpha=0.8, zorder=1.5)


def _colors(layers: Sequence[str]) -> dict[int, Any]:
    """The colours of the decoder layers, in their order."""
    from matplotlib import colormaps

    depths = sorted({_depth(name) for name in layers})
    if len(depths) == 1:
        return {depths[0]: COLORS[0]}
    shades = np.linspace(LIGHTEST, 1.0, len(depths))
    return dict(zip(depths, map(colormaps[COLOR_MAP], shades), strict=True))


def _color_bar(figure: Figure, grid: np.ndarray, color_of: Mapping[int, Any]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(color_of)
    if count == 1:
        return
    norm = BoundaryNorm(np.arange(count + 1), count)
    mappable = ScalarMappable(norm, ListedColormap(list(color_of.values())))
    bar = figure.colorbar(mappable, ax=grid, aspect=12 * len(grid), pad=0.01)
    bar.set_label("decoder layer")
    shown = range(0, count, -(-count // MAX_TICKS))
    depths = list(color_of)
    bar.set_ticks([i + 0.5 for i in shown], labels=[str(depths[i]) for i in shown])
    bar.ax.tick_params(length=0, which="both")


def _depth(name: str) -> int:
    """The first number in a layer's name: which decoder layer it is in."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else 0


def _linear(name: str) -> str:
    return name.rpartition(".")[2]


def _legend(figure: Figure, dash_of: Mapping[str, Any], has_spikes: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#444444", ls=dash, lw=1.5, label=linear)
        for linear, dash in dash_of.items()
    ]
    if has_spikes:
        handles.append(Line2D([], [], color=SPIKE_COLOR, lw=1.0, label="loss spike"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))

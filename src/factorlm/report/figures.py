"""Pictures, in one style."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factorlm.errors import ConfigError
from factorlm.report.compare import RunSummary, seconds_of
from factorlm.report.tables import format_power, format_tick
from factorlm.storage import storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B4700", "#7A4FE0", "#444444")
"""Told apart by colour-blind readers, and from white at 3:1: Okabe and Ito's, without their light
orange and sky blue. The page has the same."""
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "legend.frameon": False,
    "svg.hashsalt": "factorlm",
}
SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 150
MAX_POINTS = 800
"""Of one line."""
SMOOTHED_SHARE = 0.02
"""Share of a run's steps that one point of a training curve averages."""
SHOWN_SHARE = 0.08
"""The vertical axis begins with the losses after this share of the longest run."""
LEGEND_CHARACTERS = 150
"""That fit beside each other, the line of an entry counted as seven."""


@dataclass(frozen=True)
class Curve:
    """One run as arrays over its steps, each (num_steps,)."""

    run: RunSummary
    num_tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    """Smoothed."""

    @classmethod
    def of(cls, run: RunSummary) -> Curve:
        """The curve of ``run``."""
        losses = np.array([step.loss for step in run.steps])
        return cls(
            run=run,
            num_tokens=np.array([step.num_tokens for step in run.steps], dtype=float),
            seconds=np.array(seconds_of(run.steps)),
            loss=smooth(losses, smoothing_width(len(losses))),
        )

    def flops_at(self, num_tokens: np.ndarray) -> np.ndarray:
        """Training FLOPs by the papers' convention; a guided step takes more than another."""
        spent = [step.model_flops for step in self.run.steps]
        if None in spent:  # records of before it was counted
            return 3 * self.run.run.forward_flops_per_token * num_tokens
        return np.interp(num_tokens, [0.0, *self.num_tokens], np.array([0.0, *spent], dtype=float))

    def seconds_at(self, num_tokens: np.ndarray) -> np.ndarray:
        """Training time."""
        return np.interp(num_tokens, [0.0, *self.num_tokens], [0.0, *self.seconds])


def smoothing_width(num_steps: int) -> int:
    """Steps that one point of a training curve averages."""
    return max(1, round(SMOOTHED_SHARE * num_steps))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last ``width`` values, over fewer where there are no more."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - width)
    return (sums[stops] - sums[starts]) / (stops - starts)


def plot_losses(runs: Sequence[RunSummary], path: str | os.PathLike[str]) -> Path:
    """Loss against tokens, FLOPs and time, written to ``path`` in the format of its suffix.

    Light lines are training losses, smoothed; dark ones with points are validation losses. Raises
    ``ConfigError`` for another suffix, and where matplotlib is missing.
    """
    return save_picture(lambda: _draw_losses([Curve.of(run) for run in runs]), path)


def save_picture(draw: Callable[[], Figure], path: str | os.PathLike[str]) -> Path:
    """Write what ``draw`` draws, in our style, to ``path``; errors as ``plot_losses`` has them."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name of a picture must end in {', '.join(SUFFIXES)}")
    matplotlib = _import_matplotlib()
    with matplotlib.rc_context(STYLE), storage_errors(path):
        draw().savefig(path, dpi=DOTS_PER_INCH)
    return path


def _import_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'factorlm[plots]'") from None
    return matplotlib


def _draw_losses(curves: Sequence[Curve]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.08})
    unit, unit_seconds = time_unit(max(curve.seconds[-1] for curve in curves))
    for index, curve in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        xs = (np.asarray, curve.flops_at, lambda n, c=curve: c.seconds_at(n) / unit_seconds)
        for axes, x_of in zip(panels, xs, strict=True):
            _draw(axes, curve, color, x_of)
    labels = {
        "tokens": format_tick,
        "training FLOPs": format_power,
        f"training time ({unit})": format_tick,
    }
    for axes, (label, write) in zip(panels, labels.items(), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, w=write: w(value)))
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_ylim(*_limits(curves))
    _legend(figure, curves)
    return figure


def _draw(axes: Axes, curve: Curve, color: str, x_of: Any) -> None:
    stride = -(-len(curve.loss) // MAX_POINTS)
    x, y = x_of(curve.num_tokens[::stride]), curve.loss[::stride]
    axes.plot(x, y, color=color, alpha=0.35, lw=1.2, zorder=1.9)
    tokens = np.array([record.num_tokens for record in curve.run.curve], dtype=float)
    losses = [record.loss for record in curve.run.curve]
    every = -(-max(len(losses), 1) // 25)
    axes.plot(x_of(tokens), losses, color=color, lw=1.6, marker="o", ms=3.5, markevery=every)


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """From under the lowest loss to where the runs are once their first steep fall is over."""
    ends = [record.loss for curve in curves for record in curve.run.curve]
    low = min([*ends, *(float(np.nanmin(curve.loss)) for curve in curves)])
    start = SHOWN_SHARE * max(curve.num_tokens[-1] for curve in curves)
    high = max(float(np.interp(start, curve.num_tokens, curve.loss)) for curve in curves)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _legend(figure: Figure, curves: Sequence[Curve]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, curve in enumerate(curves):
        best = curve.run.best
        label = curve.run.label + (f" (best {best.loss:.3f})" if best else "")
        label += "" if curve.run.is_finished else ", unfinished"
        handles.append(Line2D([], [], color=COLORS[index % len(COLORS)], lw=2.5, label=label))
    gray = "#777777"
    handles.append(Line2D([], [], color=gray, marker="o", ms=3.5, lw=1.6, label="validation"))
    handles.append(Line2D([], [], color=gray, alpha=0.5, lw=1.2, label="training, smoothed"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, LEGEND_CHARACTERS // (longest + 7)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit of an axis that goes to ``seconds``, and its length in seconds."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return unit, size
    return "seconds", 1.0

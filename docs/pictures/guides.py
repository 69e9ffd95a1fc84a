"""Self-guided training: the two paths, the guide's share over the steps, and replay."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import BLOCK_SHUFFLE, DENSE, FAINT, LOW_RANK, WIDTH, box

from factorlm import GuideSchedule

NUM_STEPS, NUM_GUIDED = 80, 24
"""Of the drawing: the original steps, and those at the beginning that may have a guide."""
HEIGHT = 4.1


def guides() -> Figure:
    """How a guide comes and goes: one layer at three times, and the steps of a run."""
    drawn = Figure(figsize=(WIDTH, HEIGHT))
    paths = drawn.add_axes((0, 0.60, 1, 0.40))
    paths.set(xlim=(0, 24), ylim=(0.4 * HEIGHT / WIDTH * 24, 0))
    paths.axis("off")
    titles = ("step 0: W starts as S", "before T: α goes from 1 to 0", "from T on: S alone")
    for index, (title, share) in enumerate(zip(titles, (1.0, 0.5, 0.0), strict=True)):
        _layer(paths, 0.5 + 8 * index, title, share)
    _steps(drawn.add_axes((0.08, 0.28, 0.9, 0.26)))
    _data(drawn.add_axes((0.08, 0.03, 0.9, 0.20)))
    return drawn


def _layer(axes: Axes, x: float, title: str, share: float) -> None:
    """One layer with its guide at α = ``share``; the fainter a path, the less it counts."""
    axes.text(x, 0.6, title, va="center", weight="bold", fontsize=8)
    guide, structured = 0.25 + 0.75 * share, 0.25 + 0.75 * (1 - share)
    if share:
        _path(axes, x, 2.2, guide, DENSE, "α")
        box(axes, x + 2.1, 1.4, (1.9, 1.6), DENSE, guide)
        axes.text(x + 3.05, 2.2, "W", ha="center", va="center")
    _path(axes, x, 4.6, structured, LOW_RANK, "1 − α" if share else "1")
    axes.plot([x + 3.3, x + 3.55], [4.6, 4.6], color=LOW_RANK, lw=1.5, alpha=structured)
    box(axes, x + 2.1, 4.38, (1.2, 0.45), LOW_RANK, structured)
    box(axes, x + 3.55, 3.8, (0.45, 1.6), LOW_RANK, structured)
    axes.text(x + 2.7, 5.2, "S", ha="center", va="center")
    axes.text(x, 3.4, "x", ha="center", va="center")
    axes.text(x + 6.6, 3.4, "o", ha="center", va="center")


def _path(axes: Axes, x: float, y: float, share: float, color: str, label: str) -> None:
    look = {"color": color, "lw": 1.5, "alpha": share}
    axes.plot([x + 0.3, x + 1.2, x + 2.1], [3.4, y, y], **look)
    axes.plot([x + 4.0, x + 5.4, x + 6.2], [y, y, 3.4], **look)
    axes.text(x + 4.7, y - 0.45, label, ha="center", va="center", fontsize=8)


def _steps(axes: Axes) -> None:
    """α over the steps, and in which of them the stochastic variant runs the guide."""
    schedule = GuideSchedule(num_steps=NUM_GUIDED, variant="stochastic", seed=7)
    for step in range(NUM_STEPS + NUM_GUIDED):
        alpha = schedule.alpha_at(step)
        if schedule.is_guided(step):
            axes.bar(step, alpha, width=1, align="edge", color=DENSE, alpha=0.45, lw=0)
    line = [*range(NUM_GUIDED + 1), NUM_STEPS + NUM_GUIDED]
    axes.plot(line, [schedule.alpha_at(step) for step in line], color=DENSE, lw=1.6)
    axes.text(NUM_GUIDED * 0.72, 0.75, "α; bars: the steps that run the guide", color=DENSE)
    axes.set(xlim=(0, NUM_STEPS + NUM_GUIDED), ylim=(0, 1.08), ylabel="α", yticks=[0, 1])
    ticks = [0, NUM_GUIDED, NUM_STEPS, NUM_STEPS + NUM_GUIDED]
    axes.set_xticks(ticks, ["step 0", "T", "N original steps", "end"])
    axes.xaxis.get_ticklabels()[-1].set_ha("right")
    axes.grid(visible=False)


def _data(axes: Axes) -> None:
    """Which step's data every step reads."""
    parts = (
        (0, NUM_GUIDED, DENSE, "data 0 … T"),
        (NUM_GUIDED, NUM_STEPS - NUM_GUIDED, BLOCK_SHUFFLE, "data T … N"),
        (NUM_STEPS, NUM_GUIDED, DENSE, "data 0 … T again"),
    )
    for start, width, color, text in parts:
        box(axes, start + 0.1, 0.8, (width - 0.2, 1.0), color)
        axes.text(start + width / 2, 1.3, text, ha="center", va="center", fontsize=8)
    arrow = {"arrowstyle": "->", "color": FAINT, "connectionstyle": "arc3,rad=0.1"}
    ends = (NUM_STEPS + NUM_GUIDED / 2, 1.85), (NUM_GUIDED / 2, 1.85)
    axes.annotate("", *ends, arrowprops=arrow)
    axes.text(NUM_STEPS * 0.62, 2.4, "replay, without a guide", ha="center", fontsize=8)
    axes.text(0, 3.3, "Schematic: a run has thousands of steps.", fontsize=7.5)
    axes.set(xlim=(0, NUM_STEPS + NUM_GUIDED), ylim=(3.3, 0))
    axes.axis("off")

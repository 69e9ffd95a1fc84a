"""One style for all pictures: matplotlib's SVG, in colours that follow the light or dark page."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from factorlm.report.figures import COLORS, STYLE

DENSE, LOW_RANK, BLOCK_SHUFFLE, BLOCK_DENSE = COLORS[:4]
INK, FAINT, PALE = STYLE["axes.labelcolor"], STYLE["axes.edgecolor"], STYLE["grid.color"]
WIDTH = 6.6
"""Of every picture, in inches: about that of a page's text."""
DARK = {
    INK: "#dddddd",
    FAINT: "#999999",
    PALE: "#3a3d48",
    DENSE: "#56b4e9",
    LOW_RANK: "#f0905a",
    BLOCK_SHUFFLE: "#3fc79d",
    BLOCK_DENSE: "#dc97bd",
    COLORS[4]: "#e69f00",
}
"""What a colour becomes on a dark page."""
RC = STYLE | {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "text.color": INK,
    "font.size": 9,
}


def figure(height: float) -> Figure:
    """An empty picture, ``height`` inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """A picture of ``width`` by ``height`` units without axes, the first row on top."""
    drawn = Figure(figsize=(WIDTH, WIDTH * height / width))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return drawn, axes


def box(
    axes: Axes, x: float, y: float, size: tuple[float, float], color: str, strength: float = 1.0
) -> None:
    """A matrix, or a block of one, with its upper left corner at (x, y); ``size`` is (w, h)."""
    axes.add_patch(Rectangle((x, y), *size, facecolor=color, alpha=0.3 * strength, lw=0))
    line = Rectangle((x, y), *size, fill=False, edgecolor=color, lw=1.1, alpha=strength)
    axes.add_patch(line)


def frame(axes: Axes, x: float, y: float, size: tuple[float, float]) -> None:
    """Where a matrix of blocks has zeros."""
    axes.add_patch(Rectangle((x, y), *size, fill=False, edgecolor=FAINT, lw=0.7, ls=":"))


def save(drawn: Figure, path: Path) -> None:
    """Write ``drawn`` with a variable for each colour, so that the page says which it is."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"(?<=: )#[0-9a-fA-F]{6}\b", _variable, buffer.getvalue())
    light, dark = _values({color: color for color in DARK}), _values(DARK)
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    lines = text.replace(" <defs>", f" {style}\n <defs>", 1).splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def _variable(color: re.Match[str]) -> str:
    names = {light.lower(): _name(light) for light in DARK}
    name = names.get(color[0].lower())
    return f"var({name})" if name else color[0]


def _values(colors: dict[str, str]) -> str:
    return "".join(f"{_name(light)}:{value};" for light, value in colors.items())


def _name(color: str) -> str:
    return f"--c{list(DARK).index(color)}"


def context() -> AbstractContextManager[None]:
    """Matplotlib in this style."""
    return matplotlib.rc_context(RC)

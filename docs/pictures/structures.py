"""The structures as matrices of factors, and the shuffles of block_shuffle as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import BLOCK_DENSE, BLOCK_SHUFFLE, COLORS, DENSE, LOW_RANK, box, drawing, frame

from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, StructureConfig

IN, OUT = 768, 3072
SHARE = 0.32
TOP = 1.25
"""Where the matrices begin, in units of ``IN`` rows."""
NUM_VALUES, NUM_BLOCKS = 12, 3
STEP = 0.8
"""Of the drawing of the shuffles; between two of its values."""


class Matrix(NamedTuple):
    """A factor as it is drawn."""

    name: str
    rows: int
    columns: int
    blocks: int = 1
    left: str = ""
    """A sign on its left."""


def structures() -> Figure:
    """Dense and the three structures of a linear from 768 to 3072, to scale."""
    low_rank = LowRankConfig().for_param_ratio(IN, OUT, SHARE, multiple_of=64)
    block_shuffle = BlockShuffleConfig().for_param_ratio(IN, OUT, SHARE, multiple_of=1)
    block_dense = BlockDenseConfig(num_blocks=2).for_param_ratio(IN, OUT, SHARE, multiple_of=16)
    rank, num_blocks = low_rank.rank, block_shuffle.num_blocks
    assert rank is not None
    assert num_blocks is not None
    assert block_dense.rank is not None
    drawn, axes = drawing(9.75, TOP + OUT / IN + 0.65)
    _structure(axes, 0.05, "dense", "W", None, [Matrix("W", OUT, IN)], DENSE)
    matrices = [Matrix("U", OUT, rank), Matrix("V", rank, IN)]
    _structure(axes, 1.85, f"low_rank, R = {rank}", "W = U V", low_rank, matrices, LOW_RANK)
    matrices = [
        Matrix("second", OUT, IN, num_blocks, "T"),
        Matrix("first", IN, IN, num_blocks, "P"),
    ]
    title, product = f"block_shuffle, G = {num_blocks}", "W = T · second · P · first"
    _structure(axes, 4.15, title, product, block_shuffle, matrices, BLOCK_SHUFFLE)
    matrices = [
        Matrix("L", OUT, block_dense.rank),
        Matrix("B", block_dense.rank, IN, block_dense.num_blocks),
    ]
    title = f"block_dense, R = {block_dense.rank}"
    _structure(axes, 7.4, title, "W = L · B, G = 2", block_dense, matrices, BLOCK_DENSE)
    return drawn


def _structure(
    axes: Axes,
    x: float,
    title: str,
    product: str,
    config: StructureConfig | None,
    matrices: Sequence[Matrix],
    color: str,
) -> None:
    num_params = IN * OUT if config is None else config.num_params(IN, OUT)
    axes.text(x, 0.2, title, weight="bold", color=color)
    axes.text(x, 0.52, product)
    axes.text(x, 0.84, f"{num_params:,} ({num_params / (IN * OUT):.0%})", fontsize=8)
    for matrix in matrices:
        if matrix.left:
            axes.text(x + 0.12, TOP + 0.5, matrix.left, ha="center", va="center")
            x += 0.3
        _matrix(axes, x, matrix, color)
        x += matrix.columns / IN + 0.2


def _matrix(axes: Axes, x: float, matrix: Matrix, color: str) -> None:
    width, height = matrix.columns / IN, matrix.rows / IN
    if matrix.blocks > 1:
        frame(axes, x, TOP, (width, height))
    block = (width / matrix.blocks, height / matrix.blocks)
    for index in range(matrix.blocks):
        box(axes, x + index * block[0], TOP + index * block[1], block, color)
    shape = f"{matrix.rows // matrix.blocks} × {matrix.columns // matrix.blocks}"
    shape = shape if matrix.blocks == 1 else f"{matrix.blocks} of {shape}"
    axes.text(x, TOP + height + 0.12, f"{matrix.name}\n{shape}", fontsize=7.5, va="top")


def shuffles() -> Figure:
    """The way of 12 values through block_shuffle with three blocks."""
    drawn, axes = drawing(25.8, NUM_VALUES * 0.8 + 1.2)
    size = NUM_VALUES // NUM_BLOCKS
    places = [(j % NUM_BLOCKS) * size + j // NUM_BLOCKS for j in range(NUM_VALUES)]
    back = [places.index(j) for j in range(NUM_VALUES)]
    for x, name in ((3.4, "first"), (13.6, "second")):
        for block in range(NUM_BLOCKS):
            top, height = STEP * block * size, STEP * size
            box(axes, x, 1.1 + top, (3.4, height - 0.2), COLORS[block])
            y = 1.0 + top + height / 2
            axes.text(x + 1.7, y, f"{name}[{block}]", ha="center", va="center")
    for left, right, ends in (
        (1.2, 3.4, [*range(NUM_VALUES)]),
        (6.8, 13.6, places),
        (17, 24, back),
    ):
        _lines(axes, left, right, ends)
    for x, text in ((1.2, "x"), (10.2, "shuffle P"), (20.5, "shuffle T"), (24, "y")):
        axes.text(x, 0.5, text, ha="center", va="center")
    return drawn


def _lines(axes: Axes, left: float, right: float, ends: Sequence[int]) -> None:
    """A line from every value, coloured by its block, to where it goes."""
    for start, end in enumerate(ends):
        color = COLORS[start * NUM_BLOCKS // NUM_VALUES]
        ys = [1.0 + STEP * (place + 0.5) for place in (start, end)]
        axes.plot([left, right], ys, color=color, lw=1.1, marker="o", ms=2.2)

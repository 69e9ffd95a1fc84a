"""low_rank: y = U(Vx) + b."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def low_rank(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, I), V (R, I), U (O, R), bias (O,) -> (*, O). arXiv 2407.09835, section 2."""
    return linear(linear(x, V), U, bias)


def low_rank_dense(V: Tensor, U: Tensor) -> Tensor:
    """The dense weight U V, (O, I)."""
    return U @ V

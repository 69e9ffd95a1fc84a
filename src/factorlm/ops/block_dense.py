"""block_dense: y = L(Bx) + b with B block-diagonal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from factorlm.ops.block_diagonal import as_rows, block_diagonal
from factorlm.ops.linear_gelu import linear_gelu, takes_linear_gelu


def block_dense(x: Tensor, B: Tensor, L: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, I), B (G, R/G, I/G), L (O, R), bias (O,) -> (*, O). arXiv 2406.16450."""
    hidden = block_diagonal(as_rows(x, B), B)
    return linear(hidden, L, bias).view(*x.shape[:-1], L.shape[0])


def block_dense_gelu(x: Tensor, B: Tensor, L: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """gelu(``block_dense``), x (*, I) -> (*, O), with GELU in its second product; None where no
    kernel does that."""
    if not takes_linear_gelu(x, L, bias):
        return None
    y = linear_gelu(block_diagonal(as_rows(x, B), B), L, bias)
    return None if y is None else y.view(*x.shape[:-1], L.shape[0])


def block_dense_dense(B: Tensor, L: Tensor) -> Tensor:
    """The dense weight, (O, I): column panel g is L[:, panel g of R] B[g]."""
    return torch.bmm(*block_dense_products(B, L)).transpose(0, 1).flatten(1)


def block_dense_products(B: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """The column panels of the dense weight as products: (G, O, R/G) by (G, R/G, I/G)."""
    return L.unflatten(1, B.shape[:2]).transpose(0, 1), B

"""The product with a block-diagonal matrix, which every block structure is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def split_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x (*, G a), blocks (G, b, a) -> (N, G, a), N the number of tokens."""
    split = (blocks.shape[0], blocks.shape[2])
    return x.unflatten(-1, split).reshape(-1, *split)  # unflatten refuses another width


def block_diagonal(x: Tensor, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, G, a), blocks (G, b, a), bias (G, b) -> (N, G, b): y[n, g] = blocks[g] x[n, g].

    One batched matmul over views; the result is a view of memory laid out as (G, N, b).
    """
    rows, columns = x.transpose(0, 1), blocks.transpose(1, 2)
    if bias is None:
        product = torch.bmm(rows, columns)
    else:
        product = torch.baddbmm(bias.unsqueeze(1), rows, columns)
    return product.transpose(0, 1)

"""block_shuffle (Monarch): block-diagonal, a fixed permutation, block-diagonal.

The permutation sends hidden value j of m to group j mod G, slot j div G: a reshape to (m/G, G).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from factorlm.ops.autocast import matmul_dtype
from factorlm.ops.block_diagonal import (
    as_rows,
    block_diagonal,
    block_gradients,
    multiply_panels,
)

TOKENS_AT_ONCE = 1024
"""Of which the values between the two products fit a processor's cache."""


def block_shuffle(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    *,
    output_shuffle: bool = True,
) -> Tensor:
    """x (*, I), first (G, m/G, I/G), second (G, O/G, m/G), bias (O,) -> (*, O).

    Output s of group g lands at s G + g with ``output_shuffle``, at g O/G + s without.
    arXiv 2406.16450.
    """
    num_blocks = first.shape[0]
    if bias is not None and output_shuffle:
        bias = bias.view(-1, num_blocks).t().flatten()
    y = _in_groups(as_rows(x, first), first, second, bias)
    if output_shuffle:
        y = y.unflatten(1, (num_blocks, -1)).transpose(1, 2).flatten(1)
    return y.view(*x.shape[:-1], y.shape[1])


def _in_groups(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, I), bias (O,) -> (N, O), the outputs of each group beside each other.

    Where G² divides m and there are more tokens than columns, the rows of ``first`` are put in the
    order of the groups, which moves less than the tokens' values and leaves these in runs of m/G².
    """
    num_blocks, block_hidden, fan_in = first.shape
    if block_hidden % num_blocks or x.shape[0] < fan_in:
        hidden = block_diagonal(x, first)
        hidden = hidden.unflatten(1, (block_hidden, num_blocks)).transpose(1, 2).flatten(1)
        return block_diagonal(hidden, second, bias)
    grouped = first.unflatten(1, (-1, num_blocks)).transpose(1, 2).flatten(1, 2)
    if torch.compiler.is_compiling():  # the compiler plans the memory itself
        hidden = _swapped(block_diagonal(x, grouped), num_blocks).flatten(1)
        return block_diagonal(hidden, second, bias)
    dtype = matmul_dtype(x)
    factors = (grouped.to(dtype), second.to(dtype), None if bias is None else bias.to(dtype))
    if not torch.is_grad_enabled():
        return _multiply_grouped(x.to(dtype), *factors)
    y: Tensor = _Grouped.apply(x.to(dtype), *factors)
    return y


def _multiply_grouped(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, hidden: Tensor | None = None
) -> Tensor:
    """x (N, I) -> (N, O), some tokens at a time. What is between the products is kept in ``hidden``
    (N, m) if that is given. Not seen by autograd."""
    num_blocks = first.shape[0]
    y = x.new_empty(x.shape[0], num_blocks * second.shape[1])
    for part in _parts(x):
        product = multiply_panels(x[part], first.transpose(1, 2))
        shuffled = torch.empty_like(product) if hidden is None else hidden[part]
        _swap_into(shuffled, product, num_blocks)
        multiply_panels(shuffled, second.transpose(1, 2), bias, out=y[part])
    return y


def _swap_into(out: Tensor, hidden: Tensor, num_blocks: int) -> None:
    """hidden (N, m) by block, then group -> out (N, m) by group, then block."""
    out.unflatten(1, (num_blocks, num_blocks, -1)).copy_(_swapped(hidden, num_blocks))


def _swapped(hidden: Tensor, num_blocks: int) -> Tensor:
    """(N, m) by block, then group -> (N, G, G, m/G²) by group, then block, and the reverse."""
    return hidden.unflatten(1, (num_blocks, num_blocks, -1)).transpose(1, 2)


class _Grouped(torch.autograd.Function):
    """Both products and the shuffle between them, on a CPU some tokens at a time: what is shuffled
    is still in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        hidden = x.new_empty(x.shape[0], first.shape[0] * first.shape[1])
        y = _multiply_grouped(x, first, second, bias, hidden)
        ctx.save_for_backward(x, first, second, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, hidden = ctx.saved_tensors
        needs_x, needs_first, needs_second, needs_bias = ctx.needs_input_grad
        num_blocks = first.shape[0]
        slope, x_grad = torch.empty_like(hidden), torch.empty_like(x) if needs_x else None
        for part in _parts(x) if needs_x or needs_first else ():
            product = multiply_panels(grad[part], second)
            _swap_into(slope[part], product, num_blocks)
            if x_grad is not None:
                multiply_panels(slope[part], first, out=x_grad[part])
        return (
            x_grad,
            block_gradients(slope, x, first) if needs_first else None,
            block_gradients(grad, hidden, second) if needs_second else None,
            grad.sum(0) if needs_bias else None,
        )


def _parts(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens."""
    step = TOKENS_AT_ONCE if x.device.type == "cpu" else max(x.shape[0], 1)
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def block_shuffle_dense(first: Tensor, second: Tensor, *, output_shuffle: bool = True) -> Tensor:
    """The dense weight, (O, I), put together from its sub-blocks."""
    left, right = block_shuffle_products(first, second)
    grid = left @ right
    grid = grid.permute(2, 1, 0, 3) if output_shuffle else grid.permute(1, 2, 0, 3)
    return grid.reshape(second.shape[0] * second.shape[1], -1)


def block_shuffle_products(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The sub-blocks of the dense weight as products: (G, G, O/G, rounds) by (G, G, rounds, I/G).

    Sub-block (p, q), of input block p and group q, sums over the hidden values that the two share.
    """
    num_blocks, block_hidden, _ = first.shape
    by_hidden = second.permute(2, 0, 1).reshape(num_blocks, block_hidden, -1)  # (p, j, O/G)
    left = _group_rows(by_hidden).permute(0, 2, 3, 1)  # (p, q, O/G, rounds)
    right = _group_rows(first).transpose(1, 2)  # (p, q, rounds, I/G)
    return left, right


def num_rounds(num_blocks: int, block_hidden: int) -> int:
    """How many rounds of G groups a block of m/G hidden values touches: m/G² where G² divides m.

    Otherwise the block that starts last in a round, at G - gcd(m/G, G), decides.
    """
    latest_start = num_blocks - math.gcd(block_hidden, num_blocks)
    return -(-(latest_start + block_hidden) // num_blocks)


def _group_rows(blocks: Tensor) -> Tensor:
    """(G, m/G, k) -> (G, rounds, G, k): row r of block p moves to [p, :, q] with q its group.

    Where a block starts or ends in the middle of a round, the rest of the round is zero.
    """
    num_blocks, block_hidden, _ = blocks.shape
    length = num_rounds(num_blocks, block_hidden) * num_blocks
    if length > block_hidden:
        starts = [p * block_hidden % num_blocks for p in range(num_blocks)]
        padded = [
            pad(block, (0, 0, start, length - start - block_hidden))
            for start, block in zip(starts, blocks, strict=True)
        ]
        blocks = torch.stack(padded)
    return blocks.unflatten(1, (-1, num_blocks))

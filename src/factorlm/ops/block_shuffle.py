"""block_shuffle (Monarch): block-diagonal, a fixed permutation, block-diagonal.

The permutation sends hidden value j of m to group j mod G, slot j div G: a reshape to (m/G, G).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from factorlm.ops.autocast import is_cast, matmul_dtype
from factorlm.ops.block_diagonal import (
    FEW_TOKENS,
    as_rows,
    block_diagonal,
    multiply_each,
    panels,
)
from factorlm.ops.linear_gelu import linear_gelu, takes_linear_gelu
from factorlm.ops.observed import is_transformed

TOKENS_AT_ONCE = 2048
"""On a CPU without gradients: of so many the values between the two products are held."""
ROW_MULTIPLE = 8
"""Rows of values between the products begin at multiples of so many: tensor cores need that."""
PAGE_BYTES, CACHE_LINE_BYTES = 4096, 64
"""Rows a whole number of pages apart fall on the same lines of a cache and push each other out."""


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

    Few tokens are copied on a CPU alone, which has calls to save by that. On a GPU the batched
    product of all blocks takes every operand of ``_feature_major`` as it lies: one dimension of a
    block is dense, and the step of the other is no less than the first's size, which is all that
    ``torch.bmm`` asks for. So at any number of tokens there are two products and no copy between.
    """
    if torch.compiler.is_compiling() or is_transformed():  # see ``block_diagonal``
        return _token_major(x, first, second, bias)
    few = x.device.type == "cpu" and x.shape[0] <= FEW_TOKENS
    return (_token_major if few else _feature_major)(x, first, second, bias)


def _token_major(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """Hidden values lie as (N, m) and are copied into the order of the groups.

    Where G² divides m and there are more tokens than columns, the rows of ``first`` are put in that
    order, which moves less than the tokens' values and leaves these in runs of m/G². An exported
    program serves any number of tokens, and must not ask.
    """
    num_blocks, block_hidden, fan_in = first.shape
    if block_hidden % num_blocks or torch.compiler.is_exporting() or x.shape[0] < fan_in:
        hidden = block_diagonal(x, first).unflatten(1, (block_hidden, num_blocks))
    else:
        grouped = first.unflatten(1, (-1, num_blocks)).transpose(1, 2).flatten(1, 2)
        hidden = block_diagonal(x, grouped).unflatten(1, (num_blocks, num_blocks, -1))
    return block_diagonal(hidden.transpose(1, 2).flatten(1), second, bias)


def _feature_major(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """Hidden values lie as (m, N): group q is rows q, q + G, ..., so that nothing is copied."""
    if is_cast(x):
        dtype = matmul_dtype(x)
        x, first, second = x.to(dtype), first.to(dtype), second.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled():
        y: Tensor = _Grouped.apply(x, first, second, bias)
        return y
    return _multiply_grouped(x, first, second, bias)


def _multiply_grouped(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, hidden: Tensor | None = None
) -> Tensor:
    """x (N, I) -> (N, O). What is between the products is kept in ``hidden`` (m, N) if that is
    given, else held of some tokens at a time. Not seen by autograd."""
    num_blocks = first.shape[0]
    y = x.new_empty(x.shape[0], num_blocks * second.shape[1])
    step = TOKENS_AT_ONCE if hidden is None and x.device.type == "cpu" else x.shape[0]
    if hidden is None:
        hidden = _new_hidden(x[:step], first)
    for part, out in zip(x.split(step), y.split(step), strict=True):
        held = hidden[:, : part.shape[0]]
        multiply_each(first, panels(part, num_blocks).mT, _blocks(held, first))
        multiply_each(_groups(held, second).mT, second.mT, panels(out, num_blocks), bias)
    return y


def block_shuffle_gelu(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """gelu(``block_shuffle`` without its last shuffle), x (*, I) -> (*, O), with GELU in its second
    product; None where no kernel does that."""
    num_blocks, matrix = second.shape[0], second.flatten(0, 1)
    if not takes_linear_gelu(x, matrix, bias, num_groups=num_blocks):
        return None
    rows = as_rows(x, first)
    hidden = _new_hidden(rows, first)
    multiply_each(first, panels(rows, num_blocks).mT, _blocks(hidden, first))
    y = linear_gelu(hidden, matrix, bias, num_groups=num_blocks, by_feature=True)
    return None if y is None else y.view(*x.shape[:-1], matrix.shape[0])


class _Grouped(torch.autograd.Function):
    """Keeps x and the hidden values for the backward pass, which is not differentiable again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        hidden = _new_hidden(x, first)
        y = _multiply_grouped(x, first, second, bias, hidden)
        ctx.save_for_backward(x, first, second, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, hidden = ctx.saved_tensors
        needs_x, needs_first, needs_second, needs_bias = ctx.needs_input_grad
        inputs, slopes = panels(x, first.shape[0]), panels(grad, first.shape[0])
        slope, x_grad = _new_hidden(x, first), torch.empty_like(x) if needs_x else None
        if needs_x or needs_first:
            multiply_each(second.mT, slopes.mT, _groups(slope, second))
        if x_grad is not None:
            multiply_each(_blocks(slope, first).mT, first, panels(x_grad, first.shape[0]))
        return (
            x_grad,
            _gradients(_blocks(slope, first), inputs, first) if needs_first else None,
            _gradients(slopes.mT, _groups(hidden, second).mT, second) if needs_second else None,
            grad.sum(0) if needs_bias else None,
        )


def _blocks(hidden: Tensor, first: Tensor) -> Tensor:
    """(m, N) -> (G, m/G, N), a view: what block p of the first factor gives."""
    return hidden.unflatten(0, (first.shape[0], -1))


def _groups(hidden: Tensor, second: Tensor) -> Tensor:
    """(m, N) -> (G, m/G, N), a view: what block q of the second factor takes."""
    return hidden.unflatten(0, (-1, second.shape[0])).transpose(0, 1)


def _gradients(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    gradients = torch.empty_like(factor, memory_format=torch.contiguous_format)
    return multiply_each(left, right, gradients)


def _new_hidden(x: Tensor, first: Tensor) -> Tensor:
    """(m, N), of rows longer than N where N is no ``ROW_MULTIPLE`` or fills whole pages."""
    count = x.shape[0]
    row = -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
    if row * x.element_size() % PAGE_BYTES == 0:
        row += CACHE_LINE_BYTES // x.element_size()
    return x.new_empty(first.shape[0] * first.shape[1], row)[:, :count]


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

"""The product with a block-diagonal matrix, which every block structure is made of.

Tensors stay (N, G a), a panel of a columns for each block: each block's product is written straight
into its own panel of the result, so nothing is ever transposed or put together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from factorlm.ops.autocast import is_cast, matmul_dtype
from factorlm.ops.observed import is_transformed

FEW_TOKENS = 64
"""Up to here one batched matmul and a copy are taken on a CPU, for its one call in place of one for
each block; beyond, the copy costs more than the calls."""


def as_rows(x: Tensor, blocks: Tensor) -> Tensor:
    """x (*, G a), blocks (G, b, a) -> (N, G a), N the number of tokens."""
    num_blocks, _, fan_in = blocks.shape
    x.unflatten(-1, (num_blocks, fan_in))  # refuses another width
    return x.reshape(-1, num_blocks * fan_in)


def block_diagonal(x: Tensor, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, G a), blocks (G, b, a), bias (G b,) -> (N, G b): panel g is blocks[g] x_g + bias_g.

    Keeps x and nothing else for the backward pass, which is not differentiable again.
    """
    # A compiler plans the memory itself; a transform needs operators that PyTorch knows.
    if torch.compiler.is_compiling() or is_transformed():
        return block_diagonal_batched(x, blocks, bias)
    if is_cast(x):
        dtype = matmul_dtype(x)
        x, blocks, bias = x.to(dtype), blocks.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled():
        y: Tensor = _BlockDiagonal.apply(x, blocks, bias)
        return y
    if x.device.type == "cpu" and x.shape[0] <= FEW_TOKENS:
        return block_diagonal_batched(x, blocks, bias)
    return multiply_panels(x, blocks.transpose(1, 2), bias)


def block_diagonal_batched(x: Tensor, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch: one batched matmul over views, and a copy."""
    rows = panels(x, blocks.shape[0])
    y = torch.bmm(rows, blocks.transpose(1, 2)).transpose(0, 1).flatten(1)
    return y if bias is None else y + bias.to(y.dtype)


class _BlockDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, blocks)
        return multiply_panels(x, blocks.transpose(1, 2), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        needs_x, needs_blocks, needs_bias = ctx.needs_input_grad
        return (
            multiply_panels(grad, blocks) if needs_x else None,
            block_gradients(grad, x, blocks) if needs_blocks else None,
            grad.sum(0) if needs_bias else None,
        )


def multiply_panels(
    x: Tensor, matrices: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x (N, G a), matrices (G, a, b), bias (G b,) -> (N, G b), into ``out`` if that is given.

    Not seen by autograd.
    """
    num_blocks, _, width = matrices.shape
    y = x.new_empty(x.shape[0], num_blocks * width) if out is None else out
    multiply_each(panels(x, num_blocks), matrices, panels(y, num_blocks), bias)
    return y


def panels(x: Tensor, num_blocks: int) -> Tensor:
    """x (N, G a) -> (G, N, a), a view."""
    return x.unflatten(1, (num_blocks, -1)).transpose(0, 1)


def multiply_each(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (G, N, a), right (G, a, b), bias (G b,) -> ``out`` (G, N, b), any of them with strides.

    On a CPU a matmul for each block, elsewhere one batched matmul; BLAS takes each as it lies. Not
    seen by autograd.
    """
    if out.device.type != "cpu":
        return multiply_at_once(left, right, out, bias)
    if bias is None:
        for a, b, product in zip(left, right, out, strict=True):
            torch.mm(a, b, out=product)
    else:
        for a, b, product, offset in zip(left, right, out, bias.chunk(len(out)), strict=True):
            torch.addmm(offset, a, b, out=product)
    return out


def multiply_at_once(
    left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same as one batched matmul, in one launch."""
    if bias is None:
        return torch.bmm(left, right, out=out)
    return torch.baddbmm(bias.view(len(out), 1, -1), left, right, out=out)


def block_gradients(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:
    """grad (N, G b), x (N, G a), blocks (G, b, a) -> grad_gᵀ x_g (G, b, a), unseen by autograd."""
    gradients = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    num_blocks = blocks.shape[0]
    return multiply_each(panels(grad, num_blocks).mT, panels(x, num_blocks), gradients)

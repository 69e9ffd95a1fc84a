"""Block products on a GPU, where each is one batched product, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factorlm.ops.block_dense import block_dense, block_dense_dense
from factorlm.ops.block_shuffle import block_shuffle, block_shuffle_dense

DEVICE = "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative, in Frobenius norm, of outputs and gradients."""
SIZES = [(64, 96, 2), (64, 128, 4), (256, 1024, 4), (60, 36, 3)]
"""(inputs, outputs, G); in the last G² does not divide min(inputs, outputs)."""


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Random, the factors so small that products have values around 1."""
    draw = torch.Generator().manual_seed(0)
    x, *factors, bias = (torch.randn(shape, generator=draw) for shape in shapes)
    factors = [factor / factor.shape[-1] ** 0.5 for factor in factors]
    return [t.to(DEVICE, dtype).requires_grad_() for t in (x, *factors, bias)]


def assert_right(found: Tensor, alone: Tensor, inputs: list[Tensor], weight: Tensor) -> None:
    """``found``, its gradients, and ``alone``, without any: those of ``weight`` in float64."""
    exact = inputs[0].double() @ weight.t() + inputs[-1].double()
    slope = torch.rand(found.shape, generator=torch.Generator().manual_seed(1))
    slope = slope.to(DEVICE, found.dtype)
    gradients = torch.autograd.grad(found, inputs, slope)
    expected = torch.autograd.grad(exact, inputs, slope.double())
    for mine, truth in zip((found, alone, *gradients), (exact, exact, *expected), strict=True):
        error = torch.linalg.norm(mine.double() - truth.double())
        assert error <= TOLERANCES[found.dtype] * torch.linalg.norm(truth.double())
    assert not alone.requires_grad


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("output_shuffle", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_block_shuffle(
    sizes: tuple[int, int, int], output_shuffle: bool, num_tokens: int, dtype: torch.dtype
) -> None:
    width_in, width_out, blocks = sizes
    hidden = min(width_in, width_out) // blocks
    first, second = (blocks, hidden, width_in // blocks), (blocks, width_out // blocks, hidden)
    inputs = leaves((num_tokens, width_in), first, second, (width_out,), dtype=dtype)
    found = block_shuffle(*inputs, output_shuffle=output_shuffle)
    with torch.no_grad():
        alone = block_shuffle(*inputs, output_shuffle=output_shuffle)
    factors = [factor.double() for factor in inputs[1:3]]
    weight = block_shuffle_dense(*factors, output_shuffle=output_shuffle)
    assert_right(found, alone, inputs, weight)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_block_dense(sizes: tuple[int, int, int], num_tokens: int, dtype: torch.dtype) -> None:
    width_in, width_out, blocks = sizes
    rank = 4 * blocks
    first, second = (blocks, rank // blocks, width_in // blocks), (width_out, rank)
    inputs = leaves((num_tokens, width_in), first, second, (width_out,), dtype=dtype)
    found = block_dense(*inputs)
    with torch.no_grad():
        alone = block_dense(*inputs)
    weight = block_dense_dense(*(factor.double() for factor in inputs[1:3]))
    assert_right(found, alone, inputs, weight)

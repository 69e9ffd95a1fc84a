"""Block products in half precision: values and gradients of many tokens, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from factorlm.ops import block_diagonal, block_shuffle
from factorlm.ops.block_dense import block_dense, block_dense_dense
from factorlm.ops.block_diagonal import FEW_TOKENS
from factorlm.ops.block_shuffle import block_shuffle_dense

TOKENS, IN, OUT, BLOCKS = 2 * FEW_TOKENS + 2, 64, 128, 4
TOLERANCE = 1e-2
"""Relative, in Frobenius norm: bfloat16 keeps 8 bits, of the values between the products too."""
OPS = {
    "block_shuffle": (
        block_shuffle.block_shuffle,
        block_shuffle_dense,
        ((BLOCKS, IN // BLOCKS, IN // BLOCKS), (BLOCKS, OUT // BLOCKS, IN // BLOCKS)),
        6,  # products: two, and four of the backward pass
    ),
    "block_dense": (
        block_dense,
        block_dense_dense,
        ((BLOCKS, 8, IN // BLOCKS), (OUT, 8 * BLOCKS)),
        3,  # of the blocks alone
    ),
}


def leaves(dtype: torch.dtype, *factors: tuple[int, ...]) -> list[Tensor]:
    """x, the factors, so small that products have values around 1, and the bias."""
    draw = torch.Generator().manual_seed(0)
    found = [torch.randn(TOKENS, IN, generator=draw)]
    found += [torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for shape in factors]
    found += [torch.randn(OUT, generator=draw)]
    return [tensor.to(dtype).requires_grad_() for tensor in found]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", ["in turn", "at once"])
@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_near_the_truth(
    name: str, way: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block as a CPU computes it, and batched as an accelerator does."""
    op, to_dense, factors, num_products = OPS[name]
    product = getattr(block_diagonal, "multiply_each" if way == "in turn" else "multiply_at_once")
    calls = []

    def spied(*operands: Tensor) -> Tensor:
        calls.append(operands[0].dtype)
        return product(*operands)

    for module in (block_diagonal, block_shuffle):
        monkeypatch.setattr(module, "multiply_each", spied)
    inputs = leaves(torch.float32 if autocast else torch.bfloat16, *factors)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = op(*inputs)
    assert_near_truth(found, inputs, lambda x, a, b, bias: x @ to_dense(a, b).t() + bias)
    assert calls == [torch.bfloat16] * num_products


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_of_the_form_that_is_compiled_is_near_the_truth(autocast: bool) -> None:
    """Plain PyTorch, of which the compiler makes what it runs."""
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = leaves(dtype, (BLOCKS, OUT // BLOCKS, IN // BLOCKS))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = block_diagonal.block_diagonal_batched(*inputs)
    assert_near_truth(found, inputs, lambda x, a, bias: x @ torch.block_diag(*a).t() + bias)


def assert_near_truth(found: Tensor, inputs: list[Tensor], exactly: Callable[..., Tensor]) -> None:
    """``found`` and its gradients are those of ``exactly`` in float64."""
    assert found.dtype == torch.bfloat16
    slope = torch.rand(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(found, inputs, slope)
    assert [one.dtype for one in gradients] == [one.dtype for one in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = exactly(*exact)
    expected = torch.autograd.grad(wanted, exact, slope.double())
    for mine, truth in zip((found, *gradients), (wanted, *expected), strict=True):
        error = torch.linalg.norm(mine.double() - truth)
        assert error <= TOLERANCE * torch.linalg.norm(truth)

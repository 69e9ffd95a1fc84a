"""The gradients of low_rank in half precision on a GPU, against float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factorlm.ops.low_rank import low_rank

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative, in Frobenius norm, of outputs and gradients."""


def operands(num_tokens: int) -> list[Tensor]:
    """x, V, U, bias in float32, of which each product has values around 1."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((num_tokens, 256), (48, 256), (1024, 48), (1024,))
    found = [torch.randn(shape, generator=draw) for shape in shapes]
    found[1] /= 256**0.5
    found[2] /= 48**0.5
    return [tensor.cuda() for tensor in found]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 300])
def test_values_and_gradients(num_tokens: int, dtype: torch.dtype, autocast: bool) -> None:
    """Of rounded weights, and under autocast; with gradients few tokens take the matmuls too."""
    kept = torch.float32 if autocast else dtype
    leaves = [tensor.to(kept).requires_grad_() for tensor in operands(num_tokens)]
    with torch.autocast("cuda", dtype=dtype, enabled=autocast):
        found = low_rank(*leaves)
    assert found.dtype == dtype
    slope = torch.rand(found.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    gradients = torch.autograd.grad(found, leaves, slope)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    x, V, U, bias = exact
    wanted = x @ V.t() @ U.t() + bias
    expected = torch.autograd.grad(wanted, exact, slope.float())
    for mine, truth in zip((found, *gradients), (wanted, *expected), strict=True):
        error = torch.linalg.norm(mine.float() - truth)
        assert error <= TOLERANCES[dtype] * torch.linalg.norm(truth)

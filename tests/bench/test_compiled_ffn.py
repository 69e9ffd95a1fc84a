"""Whole FFNs through ``torch.compile``: what is fused gives the values and gradients of before."""

from __future__ import annotations

import pytest
import torch
from tests.bench.test_linear import settings_of
from torch import Tensor, nn
from torch.testing import assert_close

from factorlm.bench import BenchOptions
from factorlm.bench.ffn import build_ffns

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def values_and_gradients(run: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    y = run(x)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], slope)]


@pytest.mark.parametrize("num_tokens", [3, 130])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("structure", ["dense", "low_rank", "block_shuffle", "block_dense"])
def test_a_compiled_ffn_is_the_ffn(
    structure: str, gated: bool, backend: str, num_tokens: int
) -> None:
    torch.compiler.reset()
    setting, _ = settings_of((16, 64))
    model = build_ffns(setting, BenchOptions().configs(64, 16), gated=gated)[structure].double()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    x = torch.randn(num_tokens, 16, dtype=torch.float64, requires_grad=True)
    found = values_and_gradients(compiled, model, x)
    wanted = values_and_gradients(model, model, x)
    assert len(found) == 2 + len(list(model.parameters()))
    for mine, truth in zip(found, wanted, strict=True):
        assert_close(mine, truth, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert_close(compiled(x), wanted[0].detach(), rtol=1e-10, atol=1e-12)

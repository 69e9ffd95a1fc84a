"""Compiled FFNs on a GPU: values and gradients of the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factorlm.bench import BenchOptions
from factorlm.bench.ffn import build_ffns
from factorlm.bench.truth import check_layer


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("structure", ["dense", "low_rank", "block_shuffle", "block_dense"])
def test_a_compiled_ffn_is_right(structure: str, gated: bool, dtype: str) -> None:
    """Against dense weights in float64, to the tolerances of the benchmarks."""
    torch.compiler.reset()
    options = BenchOptions(
        shapes=((256, 1024),), num_tokens=(300,), dtypes=(dtype,), passes=("forward+backward",),
        device="cuda",
    )  # fmt: skip
    (setting,) = options.linear_settings()
    torch.manual_seed(0)
    model = build_ffns(setting, options.configs(1024, 256), gated=gated)[structure]
    calls: list[int] = []

    def run(x: Tensor) -> Tensor:
        calls.append(len(x))
        y: Tensor = compiled(x)
        return y

    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    check_layer(model, setting.draw(256)[0], run)
    assert calls == [300, 300]  # without gradients and with them

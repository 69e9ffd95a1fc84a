"""Products that take their GELU along on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from factorlm.inference.capture import capture
from factorlm.layers import BlockShuffleConfig, LowRankConfig, StructureConfig
from factorlm.layers.block_dense import BlockDenseConfig
from factorlm.ops import linear_gelu as module

TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
CONFIGS = [
    LowRankConfig(rank=192),
    LowRankConfig(rank=40),
    BlockDenseConfig(num_blocks=2, rank=192),
    BlockShuffleConfig(num_blocks=4, output_shuffle=False),
    BlockShuffleConfig(num_blocks=2, output_shuffle=False),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [4096, 5003])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_kernel_is_taken_and_right(
    config: StructureConfig,
    bias: bool,
    num_tokens: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(module, "_AGREES", {})
    layer = config.build(768, 3072, bias=bias, device="cuda", dtype=dtype)
    x = torch.randn(num_tokens, 768, device="cuda", dtype=dtype)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_()
        found = layer.forward_gelu(x).double()
        again = layer.forward_gelu(x.view(1, *x.shape))
        assert list(module._AGREES.values()) == [True]
        assert torch.equal(again.squeeze(0).double(), found)
        replay = capture(lambda: layer.forward_gelu(x))
        assert torch.equal(replay().double(), found)
        wanted = gelu(layer.double()(x.double()))
    assert torch.linalg.norm(found - wanted) <= TOLERANCES[dtype] * torch.linalg.norm(wanted)
    assert (found - wanted).abs().max() <= 40 * TOLERANCES[dtype]

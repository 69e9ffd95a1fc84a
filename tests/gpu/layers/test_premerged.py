"""Merged copies on a GPU: equal to the factors, dropped by a move, complete for every stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    MergePolicy,
    PreMergedLinear,
    StructureConfig,
)

STRUCTURES = [
    LowRankConfig(rank=32),
    BlockShuffleConfig(num_blocks=4),
    BlockDenseConfig(num_blocks=4, rank=32),
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}
"""Largest difference, as a share of the largest output, as docs/concepts/pre-merge.md states it."""
by_kind = pytest.mark.parametrize("config", STRUCTURES, ids=lambda config: config.kind)


def build(config: StructureConfig, dtype: torch.dtype = torch.float32) -> PreMergedLinear:
    layer = config.build(256, 1024, dtype=dtype)
    return PreMergedLinear(layer, MergePolicy.always()).eval()


def inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, 256, generator=draw).to("cuda", dtype)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@by_kind
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16, 300])
@torch.no_grad()
def test_the_copy_computes_the_same(
    num_tokens: int, dtype: torch.dtype, config: StructureConfig
) -> None:
    layer = build(config, dtype).cuda()
    x = inputs(num_tokens, dtype)
    found = layer(x)
    assert layer.has_copy
    assert difference(found, layer.structured(x)) <= TOLERANCES[dtype]


@by_kind
@torch.no_grad()
def test_a_move_drops_the_copy(config: StructureConfig) -> None:
    layer = build(config)
    x = inputs(16)
    wanted = layer(x.cpu())
    assert layer.has_copy
    layer.cuda()
    assert not layer.has_copy
    assert difference(layer(x).cpu(), wanted) <= TOLERANCES[torch.float32]
    assert layer.has_copy
    layer.half()
    assert not layer.has_copy
    layer(x.half())
    assert layer.has_copy
    layer.cpu()
    assert not layer.has_copy


@by_kind
@torch.no_grad()
def test_a_copy_made_on_one_stream_is_complete_on_others(config: StructureConfig) -> None:
    """The stream that makes it is kept busy first, so that a reader that did not wait would see
    memory that is not written yet."""
    x = inputs(64)
    busy = torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(10):
        layer = build(config).cuda()
        wanted = layer.structured(x)
        torch.cuda.synchronize()
        found = []
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if index == 0:
                    for _ in range(20):
                        busy @ busy
                found.append(layer(x))
        torch.cuda.synchronize()
        assert layer.has_copy
        assert all(difference(one, wanted) <= TOLERANCES[torch.float32] for one in found)

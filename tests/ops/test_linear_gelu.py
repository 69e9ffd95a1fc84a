"""A product that takes its GELU along, where there is no GPU: interpreted, compiled, left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode

from factorlm.layers import (
    BlockShuffleConfig,
    LowRankConfig,
    MergePolicy,
    PreMergedLinear,
    StructureConfig,
)
from factorlm.layers.block_dense import BlockDenseConfig
from factorlm.ops import linear_gelu as module

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
SHARED_MEMORY = 227 * 1024
"""What a GPU of capability 9.0 gives to a program."""


@on_linux
@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_compiles_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_bias: bool, by_feature: bool
) -> None:
    """As far as the machine code: tensor cores and the memory accelerator, in the memory there
    is."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from factorlm.ops import triton_linear_gelu as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    m, n, k = kernel.BLOCK_M, kernel.BLOCK_N, kernel.BLOCK_K
    constants = {"GROUPS": 4, "BY_FEATURE": by_feature, "IN_A_ROW": kernel.TILES_IN_A_ROW}
    constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PROGRAMS": 132}
    if not with_bias:
        constants["bias"] = None
    names = kernel._kernel.arg_names
    types = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    types["x"] = f"tensordesc<bf16[{k}, {m}]>" if by_feature else f"tensordesc<bf16[{m}, {k}]>"
    types |= {"weight": f"tensordesc<bf16[{n}, {k}]>", "y": f"tensordesc<bf16[{m}, {n // 2}]>"}
    if with_bias:
        types["bias"] = "*bf16"
    places = {name: (place,) for place, name in enumerate(names)}
    values = {places[name]: value for name, value in constants.items()}
    binary = triton.compile(
        ASTSource(kernel._kernel, types, values, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernel.NUM_WARPS, "num_stages": kernel.NUM_STAGES},
    )
    assert binary.metadata.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in binary.asm["ptx"]
    assert "cp.async.bulk.tensor" in binary.asm["ptx"]


class OnGPU(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def operands(num_tokens: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.zeros(num_tokens, 64, dtype=torch.bfloat16).as_subclass(OnGPU)
    weight = nn.Parameter(torch.zeros(64 * 256, 64, dtype=torch.bfloat16))
    return x, weight, torch.zeros(64 * 256, dtype=torch.bfloat16)


@pytest.fixture
def _kernel_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_kernel", lambda device: True)
    monkeypatch.setattr(module, "_is_plain", lambda tensor, like: tensor.is_contiguous())


OTHERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "few tokens": lambda x, W, b: (x[:128], W, b),
    "few outputs": lambda x, W, b: (x, W[:256].contiguous(), b[:256]),
    "a part of a tile": lambda x, W, b: (x, W[:-8].contiguous(), b[:-8]),
    "odd rows": lambda x, W, b: (x, W[:, :60].contiguous(), b),
    "strided": lambda x, W, b: (x, W.t().contiguous().t(), b),
    "float32": lambda x, W, b: (x.float().as_subclass(OnGPU), W.float(), b.float()),
    "a CPU": lambda x, W, b: (x.as_subclass(Tensor), W, b),
}


@pytest.mark.usefixtures("_kernel_is_there")
def test_what_the_kernel_takes() -> None:
    x, weight, bias = operands()
    assert not module.takes_linear_gelu(x, weight, bias)  # with gradients
    with torch.no_grad():
        assert module.takes_linear_gelu(x, weight, bias)
        assert module.takes_linear_gelu(x, weight, None, num_groups=4)
        assert not module.takes_linear_gelu(x, weight, bias, num_groups=3)
        with FlopCounterMode(display=False):
            assert not module.takes_linear_gelu(x, weight, bias)


@pytest.mark.usefixtures("_kernel_is_there")
@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_it_does_not_take(change: Callable[..., tuple[Tensor, ...]]) -> None:
    with torch.no_grad():
        assert not module.takes_linear_gelu(*change(*operands()))


@pytest.mark.parametrize("wrong", ["it fails", "it differs"])
def test_a_kernel_that_differs_or_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def launch(x: Tensor, weight: Tensor, bias: Tensor, *rest: object) -> Tensor:
        if wrong == "it fails":
            raise RuntimeError("it fails")
        return 1.1 * gelu(x @ weight.t() + bias)

    monkeypatch.setattr(module, "_AGREES", {})
    monkeypatch.setattr(module, "_launch", launch)
    x, weight, bias = torch.randn(5, 8), torch.randn(16, 8), torch.randn(16)
    with pytest.warns(UserWarning, match=wrong):
        assert module.linear_gelu(x, weight, bias) is None
    assert module.linear_gelu(x, weight, bias) is None


@pytest.mark.parametrize("by_feature", [False, True])
def test_what_a_kernel_is_compared_with(by_feature: bool) -> None:
    x, weight, bias = torch.randn(5, 4, 8), torch.randn(4, 6, 8), torch.randn(24)
    wanted = torch.stack([x[:, g] @ weight[g].t() for g in range(4)], 1).flatten(1) + bias
    given = x.permute(2, 1, 0).flatten(0, 1) if by_feature else x.flatten(1)
    found = module._product(given, weight.flatten(0, 1), bias, 4, by_feature)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "config",
    [
        LowRankConfig(rank=4),
        BlockDenseConfig(num_blocks=2, rank=4),
        BlockShuffleConfig(num_blocks=2),
        BlockShuffleConfig(num_blocks=2, output_shuffle=False),
    ],
    ids=str,
)
def test_without_a_kernel_it_is_the_layer_and_gelu(config: StructureConfig) -> None:
    layer = config.build(16, 8)
    x = torch.randn(2, 3, 16)
    assert torch.equal(layer.forward_gelu(x), gelu(layer(x)))
    with torch.no_grad():
        assert torch.equal(layer.forward_gelu(x), gelu(layer(x)))


def test_values_that_are_not_finite_say_nothing_about_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_AGREES", {})
    monkeypatch.setattr(module, "_launch", lambda x, weight, bias, *rest: gelu(x @ weight.t()))
    x, weight = torch.randn(5, 8), torch.randn(16, 8)
    assert module.linear_gelu(x * torch.nan, weight, None) is None
    assert not module._AGREES
    assert module.linear_gelu(x, weight, None) is not None


def test_hooks_wrappers_and_another_forward_are_not_passed_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = LowRankConfig(rank=4).build(16, 8)
    monkeypatch.setattr(type(layer), "fused_gelu", lambda self, x: torch.full((3, 8), 7.0))
    x = torch.randn(3, 16)
    assert layer.forward_gelu(x)[0, 0] == 7
    with layer.register_forward_hook(lambda module, args, y: 2 * y):
        assert torch.equal(layer.forward_gelu(x), gelu(layer(x)))
    merged = PreMergedLinear(layer, MergePolicy.always())
    assert torch.equal(merged.forward_gelu(x), gelu(merged(x)))
    layer.forward = lambda x: x[:, :8]
    assert torch.equal(layer.forward_gelu(x), gelu(x[:, :8]))

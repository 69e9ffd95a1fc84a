"""The Triton kernel of a product with its GELU in Triton's interpreter, against float64.

Run by ``test_interpreted.py`` in a process of its own, as ``interpreted_low_rank.py`` is.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl  # noqa: F401 - the interpreter looks for it beside a kernel
from torch import Tensor
from torch.nn.functional import gelu

from factorlm.layers import BlockShuffleConfig, StructureConfig
from factorlm.layers.block_dense import BlockDenseConfig
from factorlm.layers.low_rank import LowRankConfig
from factorlm.ops import block_dense, block_shuffle, linear_gelu, low_rank
from factorlm.ops import triton_linear_gelu as kernel

TOLERANCE = 4e-3
"""float16 rounds x, the hidden values and y; the interpreter's products are in float32."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "TILES_IN_A_ROW": 3}.items():
        monkeypatch.setattr(kernel, name, size)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    wanted = wanted.double()
    assert torch.linalg.norm(found.double() - wanted) <= TOLERANCE * torch.linalg.norm(wanted)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("fan_in", [16, 24, 40])
@pytest.mark.parametrize("num_tokens", [1, 16, 83])
def test_one_product(num_tokens: int, fan_in: int, with_bias: bool) -> None:
    x, weight = draw(num_tokens, fan_in).half(), (draw(96, fan_in) / fan_in**0.5).half()
    bias = draw(96).half() if with_bias else None
    found = kernel.linear_gelu(x, weight, bias)
    before = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype == torch.float16
    assert_near(found, gelu(before))


@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize(("num_groups", "fan_in"), [(2, 24), (4, 16), (3, 40)])
def test_groups(num_groups: int, fan_in: int, by_feature: bool) -> None:
    """Each group reads its own values, however they lie, also where a tile ends beyond them."""
    num_tokens, width = 37, 64
    values = draw(num_groups, num_tokens, fan_in).half()
    weight = (draw(num_groups, width, fan_in) / fan_in**0.5).half()
    bias = draw(num_groups * width).half()
    if by_feature:
        x = torch.full((num_groups * fan_in, 48), torch.nan).half()[:, :num_tokens]
        x.copy_(values.permute(2, 0, 1).flatten(0, 1))
    else:
        x = values.transpose(0, 1).flatten(1).contiguous()
    found = kernel.linear_gelu(
        x, weight.flatten(0, 1), bias, num_groups=num_groups, by_feature=by_feature
    )
    before = (values.double() @ weight.double().mT).transpose(0, 1).flatten(1) + bias.double()
    assert_near(found, gelu(before))


def test_gelu_is_the_exact_one_within_its_promise() -> None:
    """Each value of x alone, far beyond where the polynomial ends."""
    x = torch.linspace(-20, 20, 4001)[:, None]
    weight = torch.zeros(32, 16)
    weight[0, 0] = 1
    found = kernel.linear_gelu(torch.nn.functional.pad(x, (0, 15)), weight, None)[:, 0]
    assert (found - gelu(x[:, 0].double())).abs().max() <= 1e-4
    assert found[0] == 0
    assert found[-1] == 20


@pytest.mark.parametrize(
    "config",
    [
        LowRankConfig(rank=24),
        BlockDenseConfig(num_blocks=2, rank=32),
        BlockShuffleConfig(num_blocks=4, output_shuffle=False),
    ],
    ids=lambda config: config.kind,
)
def test_the_layers_take_it(config: StructureConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    launch = linear_gelu._launch
    for op in (low_rank, block_dense, block_shuffle):
        monkeypatch.setattr(op, "takes_linear_gelu", lambda *args, **options: True)
    monkeypatch.setattr(linear_gelu, "_launch", lambda *args: calls.append(1) or launch(*args))
    monkeypatch.setattr(linear_gelu, "_AGREES", {})
    layer = config.build(64, 128, dtype=torch.float16)
    with torch.no_grad():
        layer.bias.copy_(draw(128))
        x = draw(3, 7, 64).half()
        assert_near(layer.forward_gelu(x), gelu(layer.double()(x.double())))
        layer.half()
        layer.forward_gelu(x)
    assert len(calls) == 3  # the first was compared
    assert list(linear_gelu._AGREES.values()) == [True]

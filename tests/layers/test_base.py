"""StructuredLinear where the structure plays no part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from factorlm.errors import ConfigError, NumericError
from factorlm.layers import (
    BlockDenseConfig,
    DenseConfig,
    LowRankConfig,
    SelfGuidedLinear,
    StructuredLinear,
)


def test_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        StructuredLinear(DenseConfig(), 2, 2)  # type: ignore[abstract]


def test_memory_that_nothing_wrote_shows() -> None:
    layer = LowRankConfig(rank=2).build(4, 5, device="meta").to_empty(device="cpu")
    assert all(parameter.isnan().all() for parameter in layer.parameters())


def test_weight_cannot_be_replaced() -> None:
    layer = LowRankConfig(rank=2).build(4, 4)
    with pytest.raises(KeyError, match="'weight' already exists"):
        layer.weight = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_linear_keeps_dtype_bias_and_flags(dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 8, dtype=dtype).eval().requires_grad_(False)
    layer = StructuredLinear.from_linear(linear, LowRankConfig(rank=6))
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer.training
    assert torch.equal(layer.bias, linear.bias)
    assert layer.relative_error(linear.weight) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert StructuredLinear.from_linear(nn.Linear(6, 8, bias=False), DenseConfig()).bias is None


def test_from_linear_draws_nothing() -> None:
    linear, state = nn.Linear(6, 8), torch.get_rng_state()
    StructuredLinear.from_linear(linear, BlockDenseConfig(rank=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_from_linear_on_the_meta_device() -> None:
    linear = nn.Linear(6, 8, device="meta")
    layer = StructuredLinear.from_linear(linear, LowRankConfig(rank=2))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.to_linear().weight.is_meta


def test_low_precision_regions_do_not_round_what_is_exact() -> None:
    weight = torch.randn(8, 6)
    expected = LowRankConfig(rank=3).build(6, 8).project_(weight)
    error = expected.relative_error(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = LowRankConfig(rank=3).build(6, 8).project_(weight)
        assert layer.relative_error(weight) == pytest.approx(error, rel=1e-6)
        assert layer.to_linear().weight.dtype == torch.float32
        drawn = BlockDenseConfig(rank=4).build(6, 8)
    assert_close(layer.to_dense(), expected.to_dense())
    assert_close(drawn.L.T @ drawn.L, torch.eye(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(NumericError, match="weight is not finite"):
        LowRankConfig(rank=2).build(4, 5).project_(torch.full((5, 4), value))


def test_a_parametrised_factor_is_read() -> None:
    layer = LowRankConfig(rank=2).build(4, 5)
    nn.utils.parametrizations.orthogonal(layer, "V")
    x = torch.randn(3, 4)
    assert_close(layer.to_linear()(x), layer(x))
    assert_close(SelfGuidedLinear(layer)(x), layer(x))


def test_relative_error_of_zero() -> None:
    layer = LowRankConfig(rank=2).build(4, 5).project_(torch.zeros(5, 4))
    assert layer.relative_error(torch.zeros(5, 4)) == 0
    assert layer.relative_error(torch.ones(5, 4)) == pytest.approx(1)


def test_reset_zeroes_the_bias_and_leaves_gradients_on() -> None:
    layer = LowRankConfig(rank=2).build(4, 5)
    with torch.no_grad():
        layer.bias.fill_(3)
    layer.reset_parameters()
    assert not layer.bias.any()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="in_features=0 must be at least 1"):
        DenseConfig().build(0, 4)


def test_repr_shows_sizes_and_fields() -> None:
    text = repr(LowRankConfig(rank=2).build(4, 5, bias=False))
    expected = "in_features=4, out_features=5, bias=False, init=paper, rank=2"
    assert text == f"LowRankLinear({expected})"

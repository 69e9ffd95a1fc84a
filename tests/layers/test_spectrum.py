"""Norms from Gram matrices against singular values and dense differences in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    LowRankConfig,
    StructureConfig,
    StructuredLinear,
)
from factorlm.layers.spectrum import product_change, product_rms, spectral_norm

STRUCTURES = (
    LowRankConfig(rank=5),
    BlockDenseConfig(num_blocks=2, rank=6),
    BlockShuffleConfig(num_blocks=2),
    BlockShuffleConfig(num_blocks=6, output_shuffle=False),  # rounds that are padded
    DenseConfig(),
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def factors_of(layer: StructuredLinear) -> list[Tensor]:
    return [layer.get_parameter(factor.name).detach().clone() for factor in layer.factors]


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4), (1, 5), (3, 6, 2), (3, 2, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_spectral_norm_is_the_largest_singular_value(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    factor = draw(*shape, dtype=dtype)
    blocks = factor if factor.ndim == 3 else factor[None]
    whole = torch.block_diag(*blocks.double())
    assert_close(spectral_norm(factor), torch.linalg.svdvals(whole)[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_spectral_norm_of_float32_does_not_leave_its_range(scale: float) -> None:
    factor = draw(6, 4, dtype=torch.float32) * scale
    expected = torch.linalg.svdvals(factor.double() / scale)[0] * scale
    assert_close(spectral_norm(factor), expected, rtol=1e-12, atol=0)
    assert spectral_norm(torch.zeros(3, 2)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spectral_norm_of_what_is_not_finite_is_nan(value: float) -> None:
    factor = draw(4, 3)
    factor[1, 2] = value
    assert spectral_norm(factor).isnan()


@pytest.mark.filterwarnings("ignore:.*parts of the dense weight are always zero")
@pytest.mark.parametrize("sizes", [(12, 18), (18, 12)], ids=str)
@pytest.mark.parametrize("config", STRUCTURES, ids=repr)
def test_products_give_the_size_of_the_weight_and_of_its_change(
    config: StructureConfig, sizes: tuple[int, int]
) -> None:
    layer = config.build(*sizes, dtype=torch.float64)
    old, before = factors_of(layer), layer.weight.clone()
    with torch.no_grad():
        for seed, factor in enumerate(layer.factors):
            layer.get_parameter(factor.name).add_(draw(*factor.shape, seed=seed), alpha=0.3)
    new, after = factors_of(layer), layer.weight
    products = layer.products(*old), layer.products(*new)
    assert_close(product_rms(products[1]), after.square().mean().sqrt(), rtol=1e-12, atol=0)
    change = product_rms(product_change(*products))
    assert_close(change, (after - before).square().mean().sqrt(), rtol=1e-12, atol=0)
    assert product_rms(product_change(products[0], products[0])) == 0


@pytest.mark.parametrize("step", [1e-3, 1e-7])
def test_a_small_change_of_a_large_product_does_not_cancel(step: float) -> None:
    """Against the exact difference U ΔV + ΔU V + ΔU ΔV; a difference of RMS would be all noise."""
    U, V = 1e4 * draw(40, 6, seed=1), 1e4 * draw(6, 30, seed=2)
    du, dv = step * draw(40, 6, seed=3), step * draw(6, 30, seed=4)
    moved = (U + du, V + dv)
    du, dv = moved[0] - U, moved[1] - V  # as rounded
    exact = (U @ dv + du @ V + du @ dv).square().mean().sqrt()
    assert_close(product_rms(product_change((U, V), moved)), exact, rtol=1e-9, atol=0)


def test_a_change_of_gauge_is_no_change() -> None:
    """U → U C, V → C⁻¹ V leaves the product; the two terms of its change cancel."""
    U, V, C = draw(20, 4, seed=1), draw(4, 15, seed=2), torch.eye(4).double() + 0.1 * draw(4, 4)
    change = product_change((U, V), (U @ C, torch.linalg.inv(C) @ V))
    assert product_rms(change) < 1e-7 * product_rms((U, V))


def test_narrow_factors_are_widened_before_they_are_subtracted() -> None:
    old = [draw(9, 3, dtype=torch.bfloat16), draw(3, 8, seed=1, dtype=torch.bfloat16)]
    new = [(factor * 1.01).bfloat16() for factor in old]
    dense = [left.double() @ right.double() for left, right in (old, new)]
    expected = (dense[1] - dense[0]).square().mean().sqrt()
    change = product_rms(product_change((old[0], old[1]), (new[0], new[1])))
    assert_close(change, expected, rtol=1e-12, atol=0)


def test_inner_sizes_stay_small() -> None:
    """What the structures override ``products`` for: no Gram matrix of the weight's own size."""
    for config, inner in ((STRUCTURES[0], 5), (STRUCTURES[1], 3), (STRUCTURES[2], 3)):
        layer = config.build(12, 18)
        left, right = layer.products(*factors_of(layer))
        assert (left.shape[-1], right.shape[-2]) == (inner, inner)
        assert left.shape[:-2].numel() * left.shape[-2] * right.shape[-1] == 12 * 18


def test_the_change_is_read_pair_by_pair() -> None:
    """A walk of three steps: each change is that of its own step."""
    layer = LowRankConfig(rank=2).build(6, 5, dtype=torch.float64)
    walk = [factors_of(layer)]
    for seed in range(3):
        walk.append([f + 10.0**-seed * draw(*f.shape, seed=seed) for f in walk[-1]])
    for old, new in pairwise(walk):
        expected = (new[1] @ new[0] - old[1] @ old[0]).square().mean().sqrt()
        found = product_rms(product_change(layer.products(*old), layer.products(*new)))
        assert_close(found, expected, rtol=1e-11, atol=0)

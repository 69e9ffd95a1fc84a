"""low_rank against NumPy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorlm.errors import ConfigError
from factorlm.layers import LowRankConfig
from factorlm.testing import StructuredLinearContract


class TestLowRank(StructuredLinearContract):
    cases = (
        (LowRankConfig(rank=4), 8, 12),
        (LowRankConfig(rank=1), 7, 5),
        (LowRankConfig(rank=5), 5, 9),
        (LowRankConfig(rank=3, init="structure_aware"), 10, 4),
        (LowRankConfig(rank=1), 1, 1),
    )

    def best_residual(self, config: LowRankConfig, weight: np.ndarray) -> float:
        values = np.linalg.svd(weight, compute_uv=False)
        return float((values[config.rank :] ** 2).sum())


def test_projection_puts_the_roots_of_the_singular_values_on_each_side() -> None:
    weight = torch.randn(9, 6, dtype=torch.float64)
    layer = LowRankConfig(rank=4).build(6, 9, dtype=torch.float64).project_(weight)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)[:4]
    for gram in (layer.U.T @ layer.U, layer.V @ layer.V.T):
        np.testing.assert_allclose(gram.detach().numpy(), np.diag(values), atol=1e-12)


def test_paper_init_is_the_best_approximation_of_a_dense_draw() -> None:
    layer = LowRankConfig(rank=5).build(16, 24)
    layer.reset_parameters(std=0.02, generator=torch.Generator().manual_seed(5))
    dense = 0.02 * torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
    left, values, right = np.linalg.svd(dense.numpy(), full_matrices=False)
    expected = (left[:, :5] * values[:5]) @ right[:5]
    np.testing.assert_allclose(layer.to_dense().detach().numpy(), expected, rtol=0, atol=2e-6)


def test_full_rank_paper_init_has_the_scale_of_a_linear() -> None:
    dense = LowRankConfig(rank=64).build(64, 64).to_dense()
    assert dense.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_at_least_one(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank={rank} must be at least 1"):
        LowRankConfig(rank=rank)


def test_rank_is_at_most_the_smaller_size() -> None:
    message = r"rank=300 exceeds min\(in_features, out_features\)=256"
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(rank=300).build(256, 512)


def test_rank_must_be_solved_before_building() -> None:
    with pytest.raises(ConfigError, match="rank=None must be a number"):
        LowRankConfig().build(8, 8)


@pytest.mark.parametrize(("share", "rank"), [(0.625, 384), (0.63, 384), (0.3125, 192), (0.32, 192)])
def test_published_shares_give_the_published_ranks(share: float, rank: int) -> None:
    for sizes in ((768, 3072), (3072, 768)):
        assert LowRankConfig().for_param_ratio(*sizes, share, multiple_of=64).rank == rank


def test_solved_rank_is_the_nearest() -> None:
    for ratio in (0.01, 0.2, 0.5, 0.77, 2.0):
        solved = LowRankConfig().for_param_ratio(37, 53, ratio)
        errors = {rank: abs(rank * 90 - ratio * 37 * 53) for rank in range(1, 38)}
        assert errors[solved.rank] == min(errors.values())

"""block_dense against NumPy's SVD of each column panel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorlm.errors import ConfigError
from factorlm.layers import BlockDenseConfig
from factorlm.testing import StructuredLinearContract


class TestBlockDense(StructuredLinearContract):
    cases = (
        (BlockDenseConfig(num_blocks=2, rank=4), 8, 12),
        (BlockDenseConfig(num_blocks=3, rank=9), 9, 5),
        (BlockDenseConfig(num_blocks=3, rank=9), 15, 3),
        (BlockDenseConfig(num_blocks=5, rank=5, init="structure_aware"), 15, 7),
        (BlockDenseConfig(num_blocks=1, rank=3), 7, 6),
        (BlockDenseConfig(num_blocks=4, rank=4), 4, 1),
    )

    def best_residual(self, config: BlockDenseConfig, weight: np.ndarray) -> float:
        rank = config.rank // config.num_blocks
        panels = np.split(weight, config.num_blocks, axis=1)
        values = [np.linalg.svd(panel, compute_uv=False)[rank:] for panel in panels]
        return float(sum((value**2).sum() for value in values))


def test_paper_init_is_orthogonal_in_each_block() -> None:
    layer = BlockDenseConfig(num_blocks=4, rank=8).build(16, 24)
    for block in layer.B:
        torch.testing.assert_close(block @ block.T, torch.eye(2))
    torch.testing.assert_close(layer.L.T @ layer.L, torch.eye(8))


def test_projection_balances_each_block() -> None:
    layer = BlockDenseConfig(num_blocks=2, rank=6).build(8, 5, dtype=torch.float64)
    layer.project_(torch.randn(5, 8, dtype=torch.float64))
    for B, L in zip(layer.B, layer.L.split(3, dim=1), strict=True):
        torch.testing.assert_close(L.T @ L, B @ B.T)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BlockDenseConfig(num_blocks=4, rank=4),
            "num_blocks=4 does not divide in_features=10; nearest sizes that it divides: 8 or 12",
        ),
        (
            BlockDenseConfig(num_blocks=5, rank=3),
            "num_blocks=5 does not divide rank=3; nearest sizes that it divides: 5$",
        ),
        (
            BlockDenseConfig(num_blocks=2, rank=8),
            r"rank=8 exceeds min\(in_features, num_blocks \* out_features\)=6",
        ),
        (BlockDenseConfig(), "rank=None must be a number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: BlockDenseConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate(10, 3)


def test_blocks_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="num_blocks=0 must be at least 1"):
        BlockDenseConfig(num_blocks=0)
    with pytest.raises(ConfigError, match="rank=0 must be at least 1"):
        BlockDenseConfig(rank=0)


@pytest.mark.parametrize(
    ("hidden", "blocks", "rank", "multiple_of"),
    [(768, 2, 512, 1), (768, 2, 256, 64), (1024, 4, 768, 64), (2048, 4, 1536, 128)],
)
def test_published_sizes_are_solved_back(
    hidden: int, blocks: int, rank: int, multiple_of: int
) -> None:
    published = BlockDenseConfig(num_blocks=blocks, rank=rank)
    ratio = published.num_params(hidden, 4 * hidden) / (4 * hidden * hidden)
    solved = BlockDenseConfig(num_blocks=blocks).for_param_ratio(
        hidden, 4 * hidden, ratio, multiple_of=multiple_of
    )
    assert solved == published


@pytest.mark.parametrize(("blocks", "multiple_of"), [(3, 1), (3, 2), (2, 8), (6, 4)])
def test_solved_rank_is_the_nearest(blocks: int, multiple_of: int) -> None:
    config = BlockDenseConfig(num_blocks=blocks)
    step = np.lcm(blocks, multiple_of)
    for ratio in (0.05, 0.3, 0.63, 0.9):
        solved = config.for_param_ratio(48, 30, ratio, multiple_of=multiple_of)
        ranks = range(step, min(48, blocks * 30) + 1, step)
        errors = {
            rank: abs(config.replace(rank=int(rank)).num_params(48, 30) - ratio * 48 * 30)
            for rank in ranks
        }
        assert errors[solved.rank] == min(errors.values())


def test_blocks_that_do_not_divide_have_no_share() -> None:
    with pytest.raises(ConfigError, match="num_blocks=2 does not divide in_features=9"):
        BlockDenseConfig().for_param_ratio(9, 9, 0.5)

"""block_shuffle against NumPy's SVD of each sub-block, their ranks counted one value at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from factorlm.errors import ConfigError
from factorlm.layers import BlockShuffleConfig
from factorlm.testing import StructuredLinearContract


@pytest.mark.filterwarnings("ignore:.*parts of the dense weight are always zero")
class TestBlockShuffle(StructuredLinearContract):
    cases = (
        (BlockShuffleConfig(num_blocks=2), 8, 12),
        (BlockShuffleConfig(num_blocks=2, output_shuffle=False), 12, 8),
        (BlockShuffleConfig(num_blocks=3), 12, 15),  # G² does not divide m: ranks 1 and 2
        (BlockShuffleConfig(num_blocks=3, output_shuffle=False), 21, 15),
        (BlockShuffleConfig(num_blocks=4), 12, 8),  # G² > m: some sub-blocks are zero
        (BlockShuffleConfig(num_blocks=5, init="structure_aware"), 5, 10),
        (BlockShuffleConfig(num_blocks=1), 7, 5),
    )

    def best_residual(self, config: BlockShuffleConfig, weight: np.ndarray) -> float:
        blocks = config.num_blocks
        hidden = min(weight.shape)
        ranks = np.zeros((blocks, blocks), dtype=int)
        for j in range(hidden):
            ranks[j // (hidden // blocks), j % blocks] += 1
        size = len(weight) // blocks
        total = 0.0
        for p, panel in enumerate(np.split(weight, blocks, axis=1)):
            for q in range(blocks):
                rows = panel[q::blocks] if config.output_shuffle else panel[q * size :][:size]
                values = np.linalg.svd(rows, compute_uv=False)
                total += float((values[ranks[p, q] :] ** 2).sum())
        return total


def test_paper_init_is_orthogonal_in_each_block() -> None:
    layer = BlockShuffleConfig(num_blocks=2).build(16, 24)
    for first, second in zip(layer.first, layer.second, strict=True):
        torch.testing.assert_close(first @ first.T, torch.eye(8))
        torch.testing.assert_close(second.T @ second, torch.eye(8))


def test_balanced_in_each_sub_block() -> None:
    layer = BlockShuffleConfig(num_blocks=2).build(8, 12, dtype=torch.float64)
    layer.project_(torch.randn(12, 8, dtype=torch.float64))
    for p in range(2):
        for q in range(2):
            right = layer.first[p, q::2]
            left = layer.second[q, :, 2 * p : 2 * p + 2]
            torch.testing.assert_close(left.T @ left, right @ right.T)


def test_factors_have_the_papers_shapes() -> None:
    first, second = BlockShuffleConfig(num_blocks=4).factors(768, 3072)
    assert (first.shape, second.shape) == ((4, 192, 192), (4, 768, 192))
    first, second = BlockShuffleConfig(num_blocks=4).factors(3072, 768)
    assert (first.shape, second.shape) == ((4, 192, 768), (4, 192, 192))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 8), "does not divide in_features=10; nearest sizes that it divides: 8 or 12"),
        ((8, 3), "does not divide out_features=3; nearest sizes that it divides: 4$"),
        ((0, 4), "in_features=0 must be at least 1"),
        ((4, 0), "out_features=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockShuffleConfig(num_blocks=4).validate(*sizes)


def test_blocks_are_a_positive_number() -> None:
    with pytest.raises(ConfigError, match="num_blocks=0 must be at least 1"):
        BlockShuffleConfig(num_blocks=0)
    with pytest.raises(ConfigError, match="num_blocks=None must be a number"):
        BlockShuffleConfig().build(8, 8)


def test_warns_when_some_inputs_cannot_reach_some_outputs() -> None:
    config = BlockShuffleConfig(num_blocks=4)
    with pytest.warns(UserWarning, match="num_blocks=4: its square exceeds .*=8") as caught:
        layer = config.build(8, 8)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (layer.to_dense() == 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.num_params(8, 8)
        layer(torch.randn(2, 8))
        assert (config.build(16, 16).to_dense() != 0).all()


@pytest.mark.parametrize(
    ("sizes", "ratio", "blocks"),
    [
        ((768, 3072), 0.63, 2),
        ((3072, 768), 0.32, 4),
        ((768, 3072), 0.4, 3),
        ((768, 3072), 1.0, 1),
        ((7, 13), 0.3, 1),
        ((1536, 6144), 0.3125, 4),
    ],
)
def test_solved_blocks_are_the_nearest_common_divisor(
    sizes: tuple[int, int], ratio: float, blocks: int
) -> None:
    assert BlockShuffleConfig().for_param_ratio(*sizes, ratio).num_blocks == blocks


def test_leaving_the_output_shuffle_out_only_permutes_the_outputs() -> None:
    kept = BlockShuffleConfig(num_blocks=3).build(9, 12)
    left_out = BlockShuffleConfig(num_blocks=3, output_shuffle=False).build(9, 12)
    left_out.load_state_dict(kept.state_dict())
    order = torch.arange(12).reshape(4, 3).T.flatten()
    torch.testing.assert_close(kept.to_dense()[order], left_out.to_dense())

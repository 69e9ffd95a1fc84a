"""What structures share before anything is built: targets, the registry, rules for sizes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factorlm.errors import ConfigError
from factorlm.layers import (
    STRUCTURES,
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    Factor,
    LowRankConfig,
    LowRankLinear,
    StructureConfig,
    register_structure,
    structure_from_target,
)
from factorlm.layers.config import check_divides, round_to_multiple


def test_a_factor_is_a_matrix_or_a_stack_of_blocks() -> None:
    matrix, blocks = Factor("U", (5, 3)), Factor("B", (4, 2, 7))
    assert (matrix.num_blocks, matrix.fan_out, matrix.fan_in, matrix.num_params) == (1, 5, 3, 15)
    assert (blocks.num_blocks, blocks.fan_out, blocks.fan_in, blocks.num_params) == (4, 2, 7, 56)


def test_every_structure_has_its_battery() -> None:
    own = [kind for kind in STRUCTURES if STRUCTURES[kind].__module__.startswith("factorlm.")]
    assert {"dense", "low_rank", "block_shuffle", "block_dense"} <= set(own)
    for kind in own:
        test = Path(__file__).with_name(f"test_{kind}.py").read_text()
        assert "(StructuredLinearContract):" in test


def test_a_target_is_plain_and_names_structure_and_version() -> None:
    assert BlockShuffleConfig(num_blocks=4).to_target() == {
        "structure": "block_shuffle",
        "version": 1,
        "init": "paper",
        "num_blocks": 4,
        "output_shuffle": True,
    }


def test_a_target_needs_only_what_has_no_default() -> None:
    assert structure_from_target({"structure": "low_rank", "rank": 3}) == LowRankConfig(rank=3)
    assert structure_from_target({"structure": "dense"}) == DenseConfig()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "structure=None must be one of .*low_rank"),
        ({"structure": 3}, "structure=3 must be one of"),
        ({"structure": "lowrank"}, "unknown structure 'lowrank'.*Did you mean 'low_rank'"),
        ({"structure": "low_rank", "rnak": 3}, "unknown key 'rnak'.*Did you mean 'rank'"),
        ({"structure": "low_rank", "rank": "three"}, "rank"),
        ({"structure": "low_rank", "rank": 0}, "rank=0 must be at least 1"),
        ({"structure": "low_rank", "version": 2}, "version=2 of structure 'low_rank'"),
    ],
)
def test_a_wrong_target_is_refused(target: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure_from_target(target)


@pytest.mark.parametrize("number", [4.0, True, "4", np.int64(4)])
def test_a_size_is_an_int(number: object) -> None:
    for config, field in (
        (LowRankConfig, "rank"),
        (BlockDenseConfig, "rank"),
        (BlockDenseConfig, "num_blocks"),
        (BlockShuffleConfig, "num_blocks"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}={re.escape(repr(number))} must be an int"):
            config(**{field: number})


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="structure 'low_rank' is already registered"):
        register_structure("low_rank", DenseConfig)(LowRankLinear)
    assert DenseConfig.kind == "dense"


@given(blocks=st.integers(1, 40), size=st.integers(1, 500))
def test_check_divides_names_the_nearest_sizes(blocks: int, size: int) -> None:
    if size % blocks == 0:
        check_divides(blocks, in_features=size)
        return
    with pytest.raises(ConfigError, match=f"num_blocks={blocks} does not divide") as caught:
        check_divides(blocks, in_features=size)
    _, offered = str(caught.value).rsplit(": ", 1)
    multiples = [blocks * k for k in range(1, size + 2)]
    below = [n for n in multiples if n < size][-1:]
    above = [n for n in multiples if n > size][:1]
    assert [int(word) for word in offered.split(" or ")] == below + above


@given(
    value=st.floats(0.01, 3000),
    multiple_of=st.integers(1, 128),
    at_most=st.integers(1, 2000),
)
def test_rounding_takes_the_nearest_multiple(value: float, multiple_of: int, at_most: int) -> None:
    rounded = round_to_multiple(value, multiple_of, at_most=at_most)
    allowed = range(multiple_of, at_most + 1, multiple_of) or [at_most]
    assert rounded in allowed
    assert abs(rounded - value) == min(abs(number - value) for number in allowed)


@pytest.mark.parametrize(
    ("config", "sizes", "break_even"),
    [
        (LowRankConfig(rank=192), (768, 3072), 768 * 3072 / (768 + 3072)),
        (LowRankConfig(rank=64), (3072, 768), 768 * 3072 / (768 + 3072)),
        (BlockShuffleConfig(num_blocks=4), (768, 3072), 768 * 3072 / (4 * (768 + 3072))),
        (BlockShuffleConfig(num_blocks=2), (3072, 768), 768 * 3072 / (2 * (768 + 3072))),
        (BlockDenseConfig(num_blocks=4, rank=384), (768, 3072), 768 * 3072 / (768 + 4 * 3072)),
        (BlockDenseConfig(num_blocks=2, rank=256), (3072, 768), 768 * 3072 / (3072 + 2 * 768)),
    ],
)
def test_merging_breaks_even_with_one_step_at_the_known_number_of_tokens(
    config: StructureConfig, sizes: tuple[int, int], break_even: float
) -> None:
    tokens = config.to_dense_flops(*sizes) / config.flops_per_token(*sizes)
    assert tokens == pytest.approx(break_even)


@pytest.mark.parametrize(
    ("config", "ffn_millions"),
    [  # arXiv 2407.09835: both linears of 23 of 24 FFNs, plus the first one dense
        (LowRankConfig(rank=512), 129.0),
        (BlockDenseConfig(num_blocks=4, rank=768), 121.4),
        (LowRankConfig(rank=256), 68.7),
        (BlockDenseConfig(num_blocks=4, rank=384), 64.9),
        (BlockShuffleConfig(num_blocks=2), 129.0),
    ],
)
def test_published_ffn_parameters_of_m(config: StructureConfig, ffn_millions: float) -> None:
    one = config.num_params(1024, 4096) + config.num_params(4096, 1024)
    total = 23 * one + 2 * 1024 * 4096
    assert math.floor(total / 1e5 + 0.5) / 10 == ffn_millions

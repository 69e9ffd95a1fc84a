"""Sizes for a budget, against models built with them."""

from __future__ import annotations

import pytest

from factorlm.accounting import (
    config_for_param_ratio,
    count_params,
    flops_per_token,
    plan_for_flops,
    plan_for_params,
)
from factorlm.errors import ConfigError
from factorlm.hf import build_causal_lm
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig
from factorlm.surgery import StructureMap, factorize_
from factorlm.testing.models import tiny_model


@pytest.mark.parametrize(
    ("config", "ratio", "expected"),
    [
        (LowRankConfig(), 0.3125, LowRankConfig(rank=192)),
        (LowRankConfig(), 0.625, LowRankConfig(rank=384)),
        (BlockShuffleConfig(), 0.32, BlockShuffleConfig(num_blocks=4)),
        (BlockShuffleConfig(), 0.63, BlockShuffleConfig(num_blocks=2)),
    ],
)
def test_the_papers_sizes_solve_the_papers_shares(config, ratio, expected):
    assert config_for_param_ratio(config, 768, 3072, ratio) == expected


CONFIGS = [LowRankConfig(), BlockDenseConfig(num_blocks=2)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
@pytest.mark.parametrize("num_params", [60_000_000, 80_000_000, 100_000_000])
def test_a_plan_for_parameters_is_what_the_built_model_has(config, num_params):
    model = build_causal_lm("gpt_s", device="meta")
    plan = plan_for_params(model, config, num_params)
    factorize_(model, StructureMap(plan.configs), weights="empty")
    reached = count_params(model).total
    assert reached == plan.num_params
    # Half a rank in each of 22 linears, and the rounding of block_dense to its blocks.
    assert reached == pytest.approx(num_params, abs=22 * (768 + 3072) * 1.5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_plan_for_flops_is_what_the_built_model_costs(config):
    model = build_causal_lm("gpt_s", device="meta")
    plan = plan_for_flops(model, config, 180_000_000, seq_len=1024)
    factorize_(model, StructureMap(plan.configs), weights="empty")
    assert count_params(model).total == plan.num_params
    reached = flops_per_token(model, 1024).total
    assert reached == pytest.approx(180_000_000, abs=2 * 22 * (768 + 3072) * 1.5)


def test_the_published_model_is_recovered_from_its_size():
    plan = plan_for_params(
        build_causal_lm("gpt_s", device="meta"), LowRankConfig(), 73_950_000, multiple_of=64
    )
    assert set(plan.configs.values()) == {LowRankConfig(rank=192)}
    assert len(plan.configs) == 22
    assert plan.param_ratio == pytest.approx(0.3125, rel=1e-3)


def test_the_first_layer_can_be_structured_too():
    model = tiny_model("llama", device="meta")
    num_params = count_params(model).total - 5000
    assert len(plan_for_params(model, LowRankConfig(), num_params).configs) == 6
    plan = plan_for_params(model, LowRankConfig(), num_params, keep_first_dense=False)
    assert len(plan.configs) == 9


def test_a_structured_model_can_be_planned_anew():
    model = build_causal_lm("gpt_s", LowRankConfig(rank=100), device="meta")
    plan = plan_for_params(model, LowRankConfig(), 73_950_000, multiple_of=64)
    assert set(plan.configs.values()) == {LowRankConfig(rank=192)}


@pytest.mark.parametrize("num_params", [1_000_000, 2_000_000_000])
def test_a_budget_out_of_reach_is_refused(num_params):
    with pytest.raises(ConfigError, match=f"num_params={num_params:,} must be above .* at most"):
        plan_for_params(build_causal_lm("gpt_s", device="meta"), LowRankConfig(), num_params)


def test_a_flop_budget_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="forward_flops_per_token=10 must be above"):
        plan_for_flops(tiny_model("llama", device="meta"), LowRankConfig(), 10, seq_len=8)


def test_a_model_without_ffn_linears_is_refused():
    with pytest.raises(ConfigError, match="MixtralForCausalLM has no FFN linear"):
        plan_for_params(tiny_model("mixtral", device="meta"), LowRankConfig(), 1000)

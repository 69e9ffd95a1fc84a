"""What a recipe's ``guide`` and ``budget`` make of its steps, on the small runs of quality."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.accounting import guide_flops, training_flops
from factorlm.errors import ConfigError
from factorlm.train.assemble import build_model
from factorlm.train.describe import describe
from factorlm.train.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "quality"
CONTROL = ("--guide.variant", "none")
IN_ALL = ("--guide.share", "1.0", "--budget.flops", "null")


def described(name, *overrides):
    return describe(load_recipe(FOLDER / f"{name}.yaml", overrides))


@pytest.mark.parametrize("count", ["model_flops", "executed_flops"])
def test_dense_guided_and_control_cost_the_same(count):
    """To one step, in the FLOPs that the budget counts."""
    dense = getattr(described("dense").training, count)
    choice = ("--budget.count", count)
    guided = described("low_rank_32_guided", *choice)
    control = described("low_rank_32_guided", *choice, *CONTROL)
    step = getattr(guided.plan.step + guided.plan.guided_step, count)
    assert getattr(guided.training, count) == pytest.approx(dense, abs=step)
    assert 0 <= dense - getattr(control.training, count) < step
    assert guided.plan.num_original_steps == control.plan.num_original_steps == 2160
    assert 2160 < guided.plan.num_steps < control.plan.num_steps


def test_a_step_costs_what_the_accounting_says():
    """Muon over 16 x 256 tokens, all in one pass."""
    config = load_recipe(FOLDER / "low_rank_32_guided.yaml")
    model, _ = build_model(config)
    plan = describe(config).plan
    step = {"optimizer": "muon", "num_tokens": 4096, "num_steps": 1}
    assert plan.step == training_flops(model, seq_len=256, **step)
    assert plan.guided_step == guide_flops(
        model, tokens_per_step=4096, tokens_per_forward=4096, optimizer="muon"
    )


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("batch", "micro_batch", "1"),
        ("guide", "form", "two_path"),
        ("parallel", "activation_checkpointing", "true"),
        ("optimizer", "kind", "adamw"),
    ],
)
def test_how_a_step_is_run_changes_the_executed_flops_alone(section, field, value):
    plain = described("low_rank_32_guided", *IN_ALL)
    other = described("low_rank_32_guided", *IN_ALL, f"--{section}.{field}", value)
    assert other.training.model_flops == plain.training.model_flops
    assert other.plan.guided_step.executed_flops != plain.plan.guided_step.executed_flops


@pytest.mark.parametrize("recompute", ["true", "ffn"])
@pytest.mark.parametrize("name", ["low_rank_32_guided", "low_rank_32_control", "wide"])
def test_recomputed_activations_change_what_is_counted_and_no_step(name, recompute):
    """A resumed run may change them, so a budget must give it the same steps."""
    plain = described(name).plan
    other = described(name, "--parallel.activation_checkpointing", recompute).plan
    assert (other.num_steps, other.guide) == (plain.num_steps, plain.guide)
    assert other.step.executed_flops > plain.step.executed_flops
    if plain.guided_step is not None:
        assert other.guided_step.executed_flops != plain.guided_step.executed_flops


def test_fixed_steps_guide_a_share_of_them():
    plan = described("low_rank_32_guided", "--guide.share", "0.5", "--budget.flops", "null").plan
    assert (plan.num_steps, plan.num_original_steps, plan.guide.num_steps) == (2160, 2160, 1080)


def test_the_guides_draws_follow_the_runs_seed():
    stochastic = ("--guide.variant", "stochastic", "--guide.schedule", "linear", "--seed", "5")
    guide = described("low_rank_32_guided", *stochastic).plan.guide
    assert (guide.variant, guide.kind, guide.seed) == ("stochastic", "linear", 5)


RECIPES_OF_THE_PAIR = ("low_rank_32", "low_rank_32_guided")


def test_a_guides_memory_is_counted_and_its_parameters_are_not():
    plain, guided = (described(name) for name in RECIPES_OF_THE_PAIR)
    assert guided.params == plain.params
    weights = 6 * 96 * 384 * 4
    assert guided.memory.weights_bytes - plain.memory.weights_bytes == weights
    # Weights, gradients and moments: Muon, the recipe's optimizer, keeps one, AdamW two.
    assert guided.memory.step_bytes - plain.memory.step_bytes == 3 * weights
    pair = [described(name, "--optimizer.kind", "adamw") for name in RECIPES_OF_THE_PAIR]
    assert pair[1].memory.step_bytes - pair[0].memory.step_bytes == 4 * weights


def test_a_wide_network_takes_the_flops_that_it_names():
    flops = described("dense").training.executed_flops
    for name in ("wide", "wide_gqa"):
        wide = described(name)
        assert wide.config.budget.flops == pytest.approx(flops, rel=1e-4)
        assert 0 <= flops - wide.training.executed_flops < wide.plan.step.executed_flops


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("low_rank_32_guided", ("--budget.flops", "1e9"), r"budget\.flops=1e\+09 leaves nothing"),
        ("low_rank_32_guided", ("--budget.flops", "1e15"), r"budget\.flops=1e\+15 would guide"),
        ("low_rank_32", ("--budget.flops", "1e9"), r"budget\.flops=1e\+09 is under one step"),
        ("low_rank_32_guided", ("--guide.share", "0.5"), r"guide\.share=0\.5 and budget\.flops="),
        ("dense", ("--guide.variant", "full", "--guide.share", "1"), "needs a structure"),
    ],
)
def test_a_guide_or_a_budget_that_cannot_be_is_refused(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        described(recipe, *overrides)

"""The papers' self-guided runs and their controls as recipes give what arXiv 2407.09835 prints.

Numbers are written here as they are printed; a computed one must round to the same digits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml

from factorlm.train.describe import describe
from factorlm.train.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "papers"
SIZES = ("s", "m", "l", "xl")
STRUCTURES = ("low_rank", "block_shuffle", "block_dense")
PLAIN = [f"{size}_{structure}_32" for size in SIZES for structure in STRUCTURES]

# The share of the original steps that are guided.
SHARES = {
    "low_rank": ("0.30", "0.38", "0.41", "0.43"),
    "block_shuffle": ("0.30", "0.38", "0.41", "0.43"),
    "block_dense": ("0.30", "0.40", "0.41", "0.45"),
}
# The same of low_rank, solved by hand in real numbers.
SOLVED = {"s": 0.3007, "m": 0.3802, "l": 0.4129, "xl": 0.4316}
# Billions of tokens that low_rank takes without a guide, at the dense network's FLOPs.
CONTROL_TOKENS = {"s": "3.0", "m": "10.2", "xl": "41.5"}
# recipe: share, training FLOPs, and the steps of the dense network's tokens.
WIDE = {"wide_m_guided": ("0.40", "1.56e19", 12779), "wide_l_guided": ("0.395", "7.03e19", 27809)}


@cache
def described(name):
    return describe(load_recipe(FOLDER / f"{name}.yaml"))


def dense_flops(name):
    return described(f"{name.split('_')[0]}_dense").training.model_flops


def share_of(plan):
    return plan.guide.num_steps / plan.num_original_steps


def as_printed(value, printed):
    digits, _, exponent = printed.partition("e")
    decimals = len(digits.partition(".")[2])
    return f"{value / 10 ** int(exponent or 0):.{decimals}f}" + ("e" + exponent) * bool(exponent)


@pytest.mark.parametrize("name", PLAIN)
def test_the_published_share_of_the_steps_is_guided(name):
    size, structure = name.removesuffix("_32").split("_", 1)
    printed = SHARES[structure][SIZES.index(size)]
    assert as_printed(share_of(described(f"{name}_guided").plan), printed) == printed


@pytest.mark.parametrize("size", SIZES)
def test_the_share_is_the_solved_one_to_a_whole_step(size):
    """Half a step from rounding, and half of the solved number's last digit."""
    plan = described(f"{size}_low_rank_32_guided").plan
    rounding = 0.5 / plan.num_original_steps + 0.5e-4
    assert share_of(plan) == pytest.approx(SOLVED[size], abs=rounding)


@pytest.mark.parametrize("name", PLAIN)
def test_guided_dense_and_control_cost_the_same(name):
    """To one step, each counted by its own plan."""
    guided, control = described(f"{name}_guided").plan, described(f"{name}_control").plan
    guided_step = (guided.step + guided.guided_step).model_flops
    assert guided.total.model_flops == pytest.approx(dense_flops(name), abs=guided_step)
    left = dense_flops(name) - control.total.model_flops
    assert 0 <= left < control.step.model_flops


@pytest.mark.parametrize("name", PLAIN)
def test_the_guided_tokens_are_replayed(name):
    guided, plain = described(f"{name}_guided"), described(name)
    plan = guided.plan
    assert plan.num_original_steps == plain.config.num_steps
    assert plan.num_steps == plan.num_original_steps + plan.guide.num_steps
    assert guided.num_tokens == plan.num_steps * 512 * 1024
    replayed = [plan.data_step(step) for step in range(plan.num_original_steps, plan.num_steps)]
    assert replayed == list(range(plan.guide.num_steps))
    assert plan.guide.variant == "stochastic"
    assert plan.guide.kind == "cosine"


@pytest.mark.parametrize("name", PLAIN)
def test_the_runs_differ_in_their_switches_alone(name):
    """The same model and settings: guided adds a guide and a budget, and control one switch."""
    plain, guided, control = (described(name + end) for end in ("", "_guided", "_control"))
    assert plain.params == guided.params == control.params
    assert plain.forward == guided.forward == control.forward
    own = {field: getattr(plain.config, field) for field in ("name", "guide", "budget")}
    assert guided.config.replace(**own) == plain.config
    own = {field: getattr(guided.config, field) for field in ("name", "guide")}
    assert control.config.replace(**own) == guided.config
    assert control.plan.guide is None
    written = yaml.safe_load((FOLDER / f"{name}_control.yaml").read_text())
    assert written == {"extends": f"{name}_guided.yaml", "guide": {"variant": "none"}}


@pytest.mark.parametrize("size", CONTROL_TOKENS)
def test_tokens_of_the_control(size):
    tokens = described(f"{size}_low_rank_32_control").num_tokens
    assert as_printed(tokens / 1e9, CONTROL_TOKENS[size]) == CONTROL_TOKENS[size]


def test_tokens_of_the_control_of_l():
    """The papers' figure says 23.3B; the dense network's FLOPs buy 23.18B."""
    tokens = described("l_low_rank_32_control").num_tokens
    assert as_printed(tokens / 1e9, "23.18") == "23.18"
    assert tokens == pytest.approx(23.3e9, rel=0.006)


@pytest.mark.parametrize("name", WIDE)
def test_wide_networks(name):
    share, flops, steps = WIDE[name]
    guided, plain = described(name), described(name.removesuffix("_guided"))
    assert as_printed(share_of(guided.plan), share) == share
    assert as_printed(guided.training.model_flops, flops) == flops
    assert guided.plan.num_original_steps == steps
    assert guided.params == plain.params


def test_wide_l_costs_more_if_its_tokens_are_read_as_they_are_printed():
    """7.039e19 with 14.6B tokens, 7.03e19 with the 14.58B that the dense network takes."""
    plan = described("wide_l_guided").plan
    step = plan.step.model_flops * (1 + 0.395) + plan.guided_step.model_flops * 0.395 / 2
    assert as_printed(step * (14_580_000_000 // 512 // 1024), "7.03e19") == "7.03e19"
    assert as_printed(step * (14_600_000_000 // 512 // 1024), "7.039e19") == "7.039e19"


def test_the_papers_spend_more_on_the_wide_m_than_on_its_dense_network():
    """At the dense network's FLOPs the share would be printed as 0.39."""
    config = load_recipe(FOLDER / "wide_m_guided.yaml")
    flops = float(described("m_dense").training.model_flops)
    plan = describe(config.replace(budget=config.budget.replace(flops=flops))).plan
    assert as_printed(share_of(plan), "0.39") == "0.39"


def test_every_guided_recipe_is_compared_with_a_printed_number():
    ends = ("_guided", "_control")
    recipes = {path.stem for path in FOLDER.glob("*.yaml") if path.stem.endswith(ends)}
    assert recipes == {name + end for name in PLAIN for end in ends} | {*WIDE}

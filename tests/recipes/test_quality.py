"""The runs of reports/quality: what there is, and what each costs beside the dense one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from factorlm.layers import STRUCTURES
from factorlm.train.describe import describe
from factorlm.train.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "quality"
BLOCKS = [kind for kind in STRUCTURES if kind.startswith("block")]
SAME_TOKENS = ["dense", "low_rank_63", "low_rank_32", *(f"{kind}_32" for kind in BLOCKS)]
GUIDED = ["low_rank_32_guided", *(f"{kind}_32_guided" for kind in BLOCKS)]
MORE_TOKENS = ["low_rank_32_control", "wide", "wide_gqa"]


@cache
def described(name):
    return describe(load_recipe(FOLDER / f"{name}.yaml"))


def test_every_recipe_is_compared():
    recipes = {path.stem for path in FOLDER.glob("*.yaml")}
    assert recipes == {*SAME_TOKENS, *GUIDED, *MORE_TOKENS}


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_the_dense_tokens(name):
    """Twenty for each parameter of the dense model, to a step."""
    description = described(name)
    parameters = described("dense").params.weights - 1024 * 96
    step = description.config.tokens_per_step
    assert description.num_tokens == pytest.approx(20 * parameters, abs=step)
    assert description.plan.guide is None


@pytest.mark.parametrize("name", GUIDED + MORE_TOKENS)
def test_the_dense_flops(name):
    """To one step, guided where the run is."""
    plan = described(name).plan
    step = plan.step.executed_flops
    if plan.guided_step is not None:
        step += plan.guided_step.executed_flops
    dense = described("dense").training.executed_flops
    assert plan.total.executed_flops == pytest.approx(dense, abs=step)
    assert (plan.guide is not None) == (name in GUIDED)


@pytest.mark.parametrize(("share", "rank"), [("63", 48), ("32", 24)])
def test_shares_of_low_rank(share, rank):
    """Of a 96 x 384 weight: R (I + O) / (I O) = 0.625 and 0.3125."""
    description = described(f"low_rank_{share}")
    assert description.config.structure["rank"] == rank
    first, others = 2 * 96 * 384, 3 * 2 * rank * (96 + 384)
    assert description.params.ffn == first + others

"""The runs of reports/quality: what there is, and what each costs beside the dense one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from factorlm.layers import STRUCTURES
from factorlm.records import RecordFile, RunRecord
from factorlm.train.describe import describe
from factorlm.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
FOLDER, REPORT = ROOT / "recipes" / "quality", ROOT / "reports" / "quality"
BLOCKS = [kind for kind in STRUCTURES if kind.startswith("block")]
KINDS = ["low_rank", *BLOCKS]
SHARES = [f"{kind}_{share}" for kind in KINDS for share in ("63", "32")]
SAME_TOKENS = ["dense", *SHARES]
GUIDED = [*(f"{kind}_32_guided" for kind in KINDS), "wide_guided"]
WIDE_BLOCKS = ["wide_block_shuffle", "wide_block_shuffle_gqa"]
MORE_TOKENS = [*(f"{kind}_32_control" for kind in KINDS), "wide", "wide_gqa", *WIDE_BLOCKS]
LARGE = ["low_rank_32_guided", "low_rank_32_control", "wide_block_shuffle"]


@cache
def described(name):
    return describe(load_recipe(FOLDER / f"{name}.yaml"))


def test_every_recipe_is_compared():
    recipes = {path.stem for path in FOLDER.glob("*.yaml")}
    large = {"large_dense", *(f"large_{name}" for name in LARGE)}
    assert recipes == {*SAME_TOKENS, *GUIDED, *MORE_TOKENS, *large}


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


@pytest.mark.parametrize("name", LARGE)
def test_the_large_dense_flops(name):
    """To one step; fifteen tokens for each parameter of the dense model."""
    dense, plan = described("large_dense"), described(f"large_{name}").plan
    assert dense.num_tokens == pytest.approx(15 * 12 * 6 * 384**2, abs=65536)
    step = plan.step.executed_flops
    if plan.guided_step is not None:
        step += plan.guided_step.executed_flops
    spent = plan.total.executed_flops
    assert spent == pytest.approx(dense.training.executed_flops, abs=step)


@pytest.mark.parametrize("name", WIDE_BLOCKS)
def test_the_wide_networks_are_those_of_the_report(name):
    """What the records of the plan's row of that name were trained with."""
    row = name.replace("wide_", "wide_h128_")
    path = REPORT / "records" / f"{row}-C-s0.jsonl"
    record = next(r for r in RecordFile(path) if isinstance(r, RunRecord))
    described_here = described(name)
    config = described_here.config.to_dict()
    for section in ("model", "structure", "optimizer", "batch", "schedule", "data"):
        assert config[section] == record.config[section], section
    assert described_here.plan.num_steps == record.num_steps


@pytest.mark.parametrize("name", SHARES)
def test_shares(name):
    """Of the weights of FFNs but the first: 5/8 or half of that; block_dense's two linears have
    different shares, so of both."""
    share = 0.625 if name.endswith("63") else 0.3125
    dense = 2 * 96 * 384
    assert described(name).params.ffn == dense + 3 * share * dense


@pytest.mark.parametrize(("share", "rank"), [("63", 48), ("32", 24)])
def test_shares_of_low_rank(share, rank):
    """Of a 96 x 384 weight: R (I + O) / (I O) = 0.625 and 0.3125."""
    description = described(f"low_rank_{share}")
    assert description.config.structure["rank"] == rank
    first, others = 2 * 96 * 384, 3 * 2 * rank * (96 + 384)
    assert description.params.ffn == first + others

"""Every ladder in ``recipes/ladders/`` is planned on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.scaling.ladder import load_ladder
from factorlm.scaling.ladder.plan import LadderRun, Plan

FOLDER = Path(__file__).parents[2] / "recipes" / "ladders"


def planned(path: Path) -> tuple[Plan, list[LadderRun]]:
    """With rates of 0.008 as the best of every grid."""
    plan = Plan(load_ladder(path))
    runs, _ = plan.known(lambda found: {run.name: abs(run.rate - 8e-3) for run in found})
    return plan, runs


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_builds_on_meta(path: Path) -> None:
    plan, runs = planned(path)
    assert runs
    for run in runs:
        assert plan.describe(run).training.model_flops > 0


def test_the_books_ladder_spans_a_hundredfold() -> None:
    """Five sizes of one depth, a size's families on the same tokens, three seeds of small ones."""
    plan, runs = planned(FOLDER / "books.yaml")
    main = [run for run in runs if run.stage == "main"]
    dense = {run.size: plan.describe(run) for run in main if run.family == "dense"}
    assert len(dense) == 5
    flops = [described.training.model_flops for described in dense.values()]
    assert max(flops) / min(flops) > 100
    counts = [described.params.non_embedding for described in dense.values()]
    assert 25_000 < min(counts) < 35_000
    assert 0.95e6 < max(counts) < 1.05e6
    for size, described in dense.items():
        tokens = {run.config.batch.num_tokens for run in main if run.size == size}
        assert tokens == {20 * described.params.non_embedding}
        wide = next(r for r in main if (r.family, r.size) == ("wide_block_shuffle", size))
        assert plan.describe(wide).training.model_flops < described.training.model_flops
        assert wide.config.model.overrides["num_hidden_layers"] == 4
        seeds = {run.config.seed for run in main if run.size == size}
        assert len(seeds) == (1 if size == "w144" else 3)

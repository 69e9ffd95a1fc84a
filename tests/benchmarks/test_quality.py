"""The plan of reports/quality: what runs next, given what was found."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from factorlm.train.describe import describe

ROOT = Path(__file__).parents[2]
RECIPES = str(ROOT / "recipes" / "quality")


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def values() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "reports" / "quality" / "plan.yaml").read_text())
    return found | {"recipes": RECIPES}


def done(quality: Any, values: Any, loss_of: Callable[[Any], float], rounds: int = 9) -> Any:
    """The plan once everything that it asks for is run, ``loss_of`` giving losses."""
    losses: dict[str, float] = {}
    for _ in range(rounds):
        pending = quality.Plan(values, losses).pending()
        if not pending:
            break
        losses |= {run.name: loss_of(run) for run in pending}
    return quality.Plan(values, losses)


def bowl(best: float) -> Callable[[Any], float]:
    """Losses with one best rate; Spectron a little better than the rest."""

    def loss_of(run: Any) -> float:
        rate = run.sections["optimizer"]["learning_rate"]
        bonus = 0.1 if run.sections["optimizer"]["kind"] == "spectron" else 0.0
        return abs(rate / best - 1) - bonus

    return loss_of


def test_grids_grow_outward_until_the_best_is_inside(quality: Any) -> None:
    losses = {1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: 2.0, 16.0: 2.5, 0.5: 9.0}
    assert quality.extended([1, 2, 4], 2.0, lambda rate: None) == [1, 2, 4]
    assert quality.extended([1, 2, 4], 2.0, losses.get) == [1, 2, 4, 8, 16]
    assert quality.extended([16, 8, 32], 2.0, (losses | {32.0: 3.0}).get) == [4, 8, 16, 32]


def test_only_what_needs_no_tuned_rate_comes_first(quality: Any, values: Any) -> None:
    names = {run.name for run in quality.Plan(values, {}).pending()}
    assert all(name.startswith(("sweep-", "transfer-", "explore-")) for name in names)
    for row in values["rows"]:
        assert sum(name.startswith(f"sweep-{row}-") for name in names) >= 3


def test_full_runs_take_the_tuned_rate(quality: Any, values: Any) -> None:
    plan = done(quality, values, bowl(0.03))
    assert plan.pending() == []
    full = [run for run in plan.runs() if run.name.endswith("-s0")]
    assert {run.sections["optimizer"]["learning_rate"] for run in full} <= {0.016, 0.032}
    for run in plan.runs():
        if run.name.startswith("sweep-dense_adamw"):
            assert run.sections["optimizer"]["learning_rate"] <= 0.064


def test_every_structured_row_has_its_points_and_the_best_have_seeds(
    quality: Any, values: Any
) -> None:
    names = {run.name for run in done(quality, values, bowl(0.03)).runs()}
    for row in ("low_rank_adamw", "low_rank_aware", "low_rank_muon", "low_rank_spectron"):
        assert {f"{row}-{point}-s0" for point in "TCG"} <= names
    for kind in ("block_shuffle", "block_dense"):
        rows = {name.rsplit("-", 2)[0] for name in names if name.startswith(kind)}
        assert len(rows) == 2
        assert f"{kind}_spectron" in rows
    for row in ("dense_muon-T", "wide-C", "wide_gqa-C", "low_rank_spectron-G"):
        assert {f"{row}-s{seed}" for seed in (0, 1, 2)} <= names
    assert {"longer-dense_muon-T", "longer-low_rank_spectron-C"} <= names


def test_c_and_g_spend_what_the_best_dense_row_spends(quality: Any, values: Any) -> None:
    """Executed FLOPs, to within a step and a guided step."""
    runs = {run.name: run for run in done(quality, values, bowl(0.03)).runs()}
    budget = describe(runs["dense_muon-T-s0"].config(RECIPES)).training.executed_flops
    rows = ["low_rank_muon", "low_rank_spectron", "low_rank_aware", "block_shuffle_spectron"]
    for row in rows:
        for point in "CG":
            plan = describe(runs[f"{row}-{point}-s0"].config(RECIPES)).plan
            slack = plan.step.executed_flops
            slack += plan.guided_step.executed_flops if plan.guided_step else 0
            assert abs(plan.total.executed_flops - budget) <= slack
            assert (plan.guide is not None) == (point == "G")
    plain = describe(runs["low_rank_muon-T-s0"].config(RECIPES)).plan
    assert plain.num_steps == describe(runs["dense_muon-T-s0"].config(RECIPES)).plan.num_steps

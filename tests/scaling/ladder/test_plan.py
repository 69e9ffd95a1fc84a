"""The runs of a ladder: how many, how long, at which rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.plan import MAX_GRID, LadderRun, Plan

TUNE = {"rule": "tune", "values": [1e-3, 2e-3, 4e-3], "sizes": ["a"]}


def rates(runs: list[LadderRun], family: str) -> list[float]:
    return [run.rate for run in runs if run.stage == "tune" and run.family == family]


def test_every_family_size_and_seed(ladder: Callable[..., LadderFile]) -> None:
    runs = Plan(ladder(seeds_by_size={"a": 2})).runs({})
    first = [f"{family}-{size}-s0" for size in "abc" for family in ("dense", "low_rank")]
    assert [run.name for run in runs] == [*first, "dense-a-s1", "low_rank-a-s1"]
    last = runs[-1].config
    assert (last.seed, last.parallel.num_threads) == (1, 1)
    assert last.labels == {"ladder": "toy", "family": "low_rank", "size": "a", "stage": "main"}


def test_tokens_of_the_dense_twin(ladder: Callable[..., LadderFile]) -> None:
    """By hand: width 8, two layers, FFN of 32, biases, LayerNorms of 8 weights and biases."""
    wide = {"sizes": {"a": {"model": {"overrides": {"intermediate_size": 64}}}}}
    families = {"dense": {}, "low_rank": {"structure": {"structure": "low_rank", "rank": 2}}}
    plan = Plan(ladder(families=families | {"wide": wide}, tokens={"per_parameter": 10}))
    attention, ffn = 4 * (8 * 8 + 8), 8 * 32 + 32 + 32 * 8 + 8
    twin = 2 * (attention + ffn + 2 * 16) + 16
    tokens = {run.family: run.config.batch.num_tokens for run in plan.runs({}) if run.size == "a"}
    assert tokens == dict.fromkeys(("dense", "low_rank", "wide"), 10 * twin)


def test_tokens_of_the_own_parameters(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(tokens={"rule": "own", "per_parameter": 10}))
    for run in plan.runs({}):
        own = plan.describe(run).params.non_embedding
        assert run.config.batch.num_tokens == 10 * own
    assert len({run.config.batch.num_tokens for run in plan.runs({})}) == 6


def test_equal_flops(ladder: Callable[..., LadderFile]) -> None:
    budgets = [3e8, 9e8]
    plan = Plan(ladder(tokens={"rule": "iso_flops", "flops": budgets}))
    runs = plan.runs({})
    assert len(runs) == 2 * 3 * 2
    for run in runs:
        described = plan.describe(run)
        one_step = described.training.model_flops / described.plan.num_steps
        wanted = float(run.name.split("-")[-2])
        assert wanted in budgets
        assert abs(described.training.model_flops - wanted) <= one_step


def test_without_tuning_all_runs_are_ready(ladder: Callable[..., LadderFile]) -> None:
    runs = Plan(ladder()).runs({})
    assert not any(run.waits_for for run in runs)
    assert {run.rate for run in runs} == {1e-3}


def test_main_runs_wait_for_their_familys_rate(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(rate=TUNE))
    names = [f"tune-dense-a-{rate:g}" for rate in TUNE["values"]]  # type: ignore[attr-defined]
    main = [run for run in plan.runs({}) if run.stage == "main"]
    assert all(run.waits_for for run in main)
    losses = dict(zip(names, [3.0, 1.0, 3.0], strict=True))
    after = {run.name: run for run in plan.runs(losses) if run.stage == "main"}
    assert {after[f"dense-{size}-s0"].rate for size in "abc"} == {2e-3}
    assert not after["dense-c-s0"].waits_for
    assert after["low_rank-c-s0"].waits_for


def test_a_grid_grows_until_its_best_is_inside(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(rate=TUNE))
    losses = {"tune-dense-a-0.001": 3.0, "tune-dense-a-0.002": 2.0, "tune-dense-a-0.004": 1.0}
    assert rates(plan.runs(losses), "dense") == [1e-3, 2e-3, 4e-3, 8e-3]
    main = next(run for run in plan.runs(losses) if run.name == "dense-a-s0")
    assert main.waits_for == ("tune-dense-a-0.008",)
    losses["tune-dense-a-0.008"] = 1.5
    assert rates(plan.runs(losses), "dense") == [1e-3, 2e-3, 4e-3, 8e-3]
    main = next(run for run in plan.runs(losses) if run.name == "dense-a-s0")
    assert (main.rate, main.waits_for) == (4.49e-3, ())  # the lowest of a parabola
    losses["tune-dense-a-0.001"] = 0.5
    assert rates(plan.runs(losses), "dense")[0] == 5e-4
    assert rates(plan.runs(losses), "low_rank") == TUNE["values"]


def test_all_sizes_take_the_line_through_the_tuned_ones(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(rate=TUNE | {"sizes": ["a", "b"]}, families={"dense": {}}))
    lowest = {"a": 2.5e-3, "b": 1.6e-3}
    losses = {
        f"tune-dense-{size}-{rate:g}": math.log(rate / lowest[size]) ** 2
        for size in "ab"
        for rate in (1e-3, 2e-3, 4e-3)
    }
    one = dict(list(losses.items())[:3])
    waiting = next(run for run in plan.runs(one) if run.name == "dense-a-s0")
    assert waiting.waits_for == tuple(losses)[3:]
    runs = {run.size: run for run in plan.runs(losses) if run.stage == "main"}
    params = {size: plan.describe(run).params.non_embedding for size, run in runs.items()}
    power = math.log(1.6 / 2.5) / math.log(params["b"] / params["a"])
    expected = lowest | {"c": 1.6e-3 * (params["c"] / params["b"]) ** power}
    for size, run in runs.items():
        assert run.rate == pytest.approx(expected[size], rel=5e-3)


def test_a_tuned_size_where_all_failed_holds_nothing_up(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(rate=TUNE | {"sizes": ["a", "b"]}, families={"dense": {}}))
    names = [run.name for run in plan.runs({}) if run.stage == "tune"]
    losses = dict(zip(names, [3.0, 1.0, 3.0, *[math.inf] * 3], strict=True))
    runs = [run for run in plan.runs(losses) if run.stage == "main"]
    assert {(run.rate, run.waits_for) for run in runs} == {(2e-3, ())}


def test_a_rate_that_failed_is_not_the_best(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(rate=TUNE))
    names = ["tune-dense-a-0.001", "tune-dense-a-0.002", "tune-dense-a-0.004"]
    losses = dict(zip(names, [3.0, 2.0, math.inf], strict=True))
    main = next(run for run in plan.runs(losses) if run.name == "dense-a-s0")
    assert (main.rate, main.waits_for) == (2e-3, ())
    nothing = next(
        run for run in plan.runs(dict.fromkeys(names, math.inf)) if run.name == "dense-a-s0"
    )
    assert nothing.waits_for == tuple(names)


def test_a_grid_does_not_grow_for_ever(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(rate=TUNE, families={"dense": {}}))
    losses: dict[str, float] = {}
    while new := [r for r in plan.runs(losses) if r.stage == "tune" and r.name not in losses]:
        losses |= {run.name: -run.rate for run in new}
    assert len(losses) == MAX_GRID


def test_tuning_takes_its_share_of_the_tokens(ladder: Callable[..., LadderFile]) -> None:
    share = TUNE | {"token_share": 0.5}
    fixed = Plan(ladder(rate=share, tokens={"rule": "fixed", "num_tokens": 1280}))
    assert {run.config.batch.num_tokens for run in fixed.runs({}) if run.stage == "tune"} == {640}
    iso = Plan(ladder(rate=share, tokens={"rule": "iso_flops", "flops": [6e8]}))
    assert {run.config.budget.flops for run in iso.runs({}) if run.stage == "tune"} == {3e8}


def test_names_that_meet_are_refused(ladder: Callable[..., LadderFile]) -> None:
    sizes = ladder().ladder.sizes
    with pytest.raises(ConfigError, match="two runs are named 'x-a-b-s0'"):
        Plan(
            ladder(families={"x": {}, "x-a": {}}, sizes={"a-b": sizes["a"], "b": sizes["a"]})
        ).runs({})


def test_a_model_that_cannot_be_built_names_the_run(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(families={"x": {"structure": {"structure": "low_rnk"}}}))
    with pytest.raises(ConfigError, match=r"ladder toy, run x-a-s0: structure: unknown structure"):
        plan.describe(plan.runs({})[0])

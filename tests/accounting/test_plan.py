"""Steps for a budget of FLOPs, against sums over steps and shares computed by hand."""

from __future__ import annotations

import math

import pytest

from factorlm.accounting import (
    StepPlan,
    TrainingFlops,
    guided_share,
    plan_guided,
    plan_without_guide,
)
from factorlm.errors import ConfigError
from factorlm.optim import GuideSchedule

STEP = TrainingFlops(model_flops=60, executed_flops=75)
GUIDED = TrainingFlops(model_flops=50, executed_flops=30)
"""What a guided step adds."""
VARIANTS = ("full", "stochastic")
KINDS = ("cosine", "linear")


def guide(variant="stochastic", num_steps=1, **fields):
    return GuideSchedule(num_steps=num_steps, variant=variant, **fields)


def fixed_flops(budget, num_steps=1000, variant="stochastic", count="model_flops", **fields):
    schedule = guide(variant, **fields)
    return plan_guided(num_steps, STEP, GUIDED, schedule, budget=budget, count=count)


# The share -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structured", "dense", "budget", "variant", "share"),
    [
        (60.0, 50.0, 100.0, "full", 4 / 11),  # 40 / 110
        (60.0, 50.0, 100.0, "stochastic", 8 / 17),  # 40 / 85
        (60.0, 50.0, 60.0, "full", 0.0),
        (60.0, 50.0, 145.0, "stochastic", 1.0),
        # s low_rank 32 %, its dense network at 1.6946e18 and 22 guides of 768 x 3072.
        (1.22360e18, 4196 * 512 * 1024 * 22 * 6 * 768 * 3072, 1.69461e18, "stochastic", 0.3007),
    ],
)
def test_share_by_hand(structured, dense, budget, variant, share):
    assert guided_share(structured, dense, budget, variant=variant) == pytest.approx(
        share, abs=1e-4
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [61.0, 80.0, 99.5])
def test_the_share_solves_its_equation(budget, variant):
    share = guided_share(60.0, 50.0, budget, variant=variant)
    weight = {"full": 1.0, "stochastic": 0.5}[variant]
    assert 60 * (1 + share) + weight * 50 * share == pytest.approx(budget)


# Without a guide -----------------------------------------------------------------------------


def test_without_a_budget_a_run_has_its_steps():
    plan = plan_without_guide(10, STEP)
    assert (plan.num_steps, plan.num_original_steps, plan.guide) == (10, 10, None)
    assert plan.total == TrainingFlops(600, 750)
    assert plan.num_replayed_steps == 0


@pytest.mark.parametrize(("count", "num_steps"), [("model_flops", 16), ("executed_flops", 13)])
def test_a_budget_buys_whole_steps_of_new_data(count, num_steps):
    """1019 / 60 and 1019 / 75."""
    plan = plan_without_guide(10, STEP, budget=1019, count=count)
    assert plan.num_steps == num_steps
    assert getattr(plan.total, count) <= 1019 < getattr(plan.spent(num_steps + 1), count)
    assert [plan.data_step(step) for step in range(num_steps)] == list(range(num_steps))
    assert plan.num_replayed_steps == 0


def test_a_budget_of_exactly_so_many_steps_buys_them():
    """Also where a float could not hold the sum."""
    step = TrainingFlops(model_flops=1_578_348_941_672_449, executed_flops=0)
    assert plan_without_guide(1, step, budget=44_631 * step.model_flops).num_steps == 44_631


def test_a_budget_may_cut_a_run_short():
    assert plan_without_guide(10, STEP, budget=130).num_steps == 2


def test_a_budget_under_one_step_is_refused():
    with pytest.raises(ConfigError, match=r"budget\.flops=59 is under one step of 60"):
        plan_without_guide(10, STEP, budget=59)


# With a guide --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixed_steps_keep_the_run_and_the_schedule(variant):
    plan = plan_guided(10, STEP, GUIDED, guide(variant, 5))
    assert (plan.num_steps, plan.num_original_steps) == (10, 10)
    assert plan.guide == guide(variant, 5)
    assert [plan.data_step(step) for step in range(10)] == list(range(10))
    assert plan.num_replayed_steps == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", ["model_flops", "executed_flops"])
@pytest.mark.parametrize("budget", [76_000, 80_000, 90_000.5])
def test_fixed_flops_are_met_to_one_guided_step(budget, count, variant, kind):
    plan = fixed_flops(budget, variant=variant, count=count, kind=kind)
    dearest = getattr(STEP + GUIDED, count)
    assert getattr(plan.total, count) == pytest.approx(budget, abs=dearest)
    assert plan.num_original_steps == 1000
    assert (plan.guide.kind, plan.guide.variant) == (kind, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_end_reads_what_the_guided_steps_read(variant):
    plan = fixed_flops(80_000, variant=variant)
    read = [plan.data_step(step) for step in range(plan.num_steps)]
    assert read[:1000] == list(range(1000))
    assert read[1000:] == list(range(plan.guide.num_steps))
    assert len(read) == 1000 + plan.guide.num_steps == 1000 + plan.num_replayed_steps
    guided = {plan.data_step(step) for step in range(1000) if plan.guide.is_guided(step)}
    assert guided <= {*read[1000:]}
    assert not any(plan.guide.is_guided(step) for step in range(1000, plan.num_steps))


def test_the_schedule_is_the_given_one_with_its_steps_solved():
    plan = fixed_flops(100_000, kind="linear", seed=7)
    assert plan.guide == guide(num_steps=471, kind="linear", seed=7)  # 8/17 of 1000, to a step


@pytest.mark.parametrize("budget", [40_000, 60_000, 60_020])
def test_a_budget_that_leaves_nothing_for_a_guide_is_refused(budget):
    """60,020 buys a quarter of a guided step."""
    message = r"budget\.flops=.* leaves nothing for a guide: .* alone cost 6e\+04"
    with pytest.raises(ConfigError, match=message):
        fixed_flops(budget)


def test_half_a_guided_step_is_refused_by_the_budgets_name():
    """The share of one step, exactly 1/2, rounds to no step."""
    with pytest.raises(ConfigError, match=r"budget\.flops=115 leaves nothing for a guide"):
        fixed_flops(115, num_steps=1, variant="full")


def test_a_budget_for_more_guided_steps_than_there_are_is_refused():
    """60,000 + 1.2 x 85,000."""
    message = r"budget\.flops=1\.62e\+05 would guide 1\.20 times .* state more batch\.num_tokens"
    with pytest.raises(ConfigError, match=message):
        fixed_flops(162_000)


def test_a_budget_for_a_guide_in_every_original_step_is_taken():
    plan = fixed_flops(145_000)
    assert plan.guide.num_steps == 1000
    assert plan.num_steps == 2000


# Sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [None, 1_000])
def test_spent_is_the_sum_of_the_steps_as_they_are_drawn(budget, variant, kind):
    schedule = guide(variant, 8, kind=kind, seed=3)
    plan = plan_guided(12, STEP, GUIDED, schedule, budget=budget)
    model_flops = executed_flops = 0
    for step in range(plan.num_steps + 1):
        assert plan.spent(step) == TrainingFlops(model_flops, executed_flops), step
        model_flops, executed_flops = model_flops + 60, executed_flops + 75
        if plan.guide.is_guided(step):
            model_flops, executed_flops = model_flops + 50, executed_flops + 30


def test_total_is_the_mean_of_spent_over_seeds():
    """To four standard errors of the mean over 400 seeds; together 2 % of the guide's FLOPs."""
    plans = [plan_guided(100, STEP, GUIDED, guide(num_steps=60, seed=seed)) for seed in range(400)]
    spent = [plan.spent(100).model_flops for plan in plans]
    alphas = [plans[0].guide.alpha_at(step) for step in range(60)]
    deviation = 50 * math.sqrt(sum(alpha * (1 - alpha) for alpha in alphas))
    mean, (total,) = sum(spent) / 400, {plan.total.model_flops for plan in plans}
    assert total == 100 * 60 + round(50 * sum(alphas))
    assert mean == pytest.approx(total, abs=4 * deviation / 20)


def test_a_full_guide_is_in_every_step_of_its_own():
    plan = plan_guided(10, STEP, GUIDED, guide("full", 4))
    assert plan.total == plan.spent(10) == TrainingFlops(600 + 200, 750 + 120)


def test_a_plan_without_a_guide_spends_step_by_step():
    plan = StepPlan(5, 5, None, STEP, None)
    assert [plan.spent(step) for step in range(6)] == [STEP.times(step) for step in range(6)]
    assert plan.spent(5) == plan.total

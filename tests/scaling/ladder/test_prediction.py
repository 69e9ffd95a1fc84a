"""What a ladder is said to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from factorlm.scaling.ladder.calibration import EVAL_STEPS, STEPS, WARM_UP, Speed, few_steps
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.plan import Plan
from factorlm.scaling.ladder.prediction import num_eval_tokens, predict

SPEED = Speed(
    flops_per_second=1e6, eval_tokens_per_second=50.0, num_validation_tokens=4000, start_seconds=7.0
)


def test_hours_are_those_of_steps_evaluations_and_the_start() -> None:
    assert SPEED.hours(3e6, 200) == pytest.approx((3 + 4 + 7) / 3600)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"num_tokens": 128, "final_num_tokens": 128}, 128),
        ({"num_tokens": 128, "final_num_tokens": None}, 128 + 4000),
        ({"num_tokens": None, "final_num_tokens": None}, 4000),
        ({"num_tokens": 9000, "final_num_tokens": 9000}, 4000),
        ({"every_steps": 5, "num_tokens": 128, "final_num_tokens": 128}, 2 * 128),
        ({"every_steps": 3, "num_tokens": 128, "final_num_tokens": 256}, 4 * 128 + 256),
    ],
)
def test_tokens_that_a_run_of_ten_steps_evaluates(
    ladder: Callable[..., LadderFile], section: dict[str, int | None], expected: int
) -> None:
    config = Plan(ladder()).runs({})[0].config
    changed = config.replace(eval=config.eval.replace(**section))
    assert num_eval_tokens(changed, 10, 4000) == expected


def test_hours_left_are_those_of_what_is_missing(ladder: Callable[..., LadderFile]) -> None:
    plan = Plan(ladder(families={"dense": {}}))
    runs = plan.runs({})
    speeds = {(run.family, run.size): replace(SPEED, start_seconds=3600.0) for run in runs}
    both = predict(plan, runs, {}, speeds, workers=2)
    assert both.hours_left == pytest.approx(sum(run.hours or 0 for run in both.runs) / 2)
    assert both.hours_left == pytest.approx(1.5, abs=0.1)
    one = predict(plan, runs, {"dense-a-s0": 4.0, "dense-b-s0": 4.0}, speeds, workers=2)
    assert one.hours_left == one.runs[2].hours
    assert predict(plan, runs, {}, {}, workers=2).hours_left is None


def test_a_calibration_is_short_and_evaluates_little(ladder: Callable[..., LadderFile]) -> None:
    few = few_steps(Plan(ladder()).runs({})[0])
    assert few.batch.num_steps == WARM_UP + STEPS
    assert few.eval.every_steps is None
    assert few.eval.num_tokens == few.eval.final_num_tokens == EVAL_STEPS * 8 * 16


def test_a_calibration_is_the_same_before_and_after_tuning(
    ladder: Callable[..., LadderFile],
) -> None:
    rate = {"rule": "tune", "values": [1e-3, 2e-3, 4e-3], "sizes": ["a"]}
    plan = Plan(ladder(rate=rate, families={"dense": {}}))
    losses = {f"tune-dense-a-{value:g}": abs(value - 2e-3) for value in (1e-3, 2e-3, 4e-3)}
    before, after = (plan.runs(known)[-1] for known in ({}, losses))
    assert before.rate != after.rate
    assert few_steps(before) == few_steps(after)

"""A ladder's plan as a table and a sentence."""

from __future__ import annotations

from factorlm.report.ladder import plan_summary, plan_table
from factorlm.scaling.ladder.prediction import PlannedRun, Prediction


def planned(
    name: str, *, rate: float | None, hours: float | None, loss: float | None
) -> PlannedRun:
    return PlannedRun(
        name=name,
        family="dense",
        size="a",
        stage="main",
        seed=0,
        learning_rate=rate,
        num_params=1_500_000,
        num_non_embedding_params=1_000_000,
        num_tokens=20_000_000,
        num_steps=4883,
        training_flops=1e14,
        executed_training_flops=3e14,
        hours=hours,
        loss=loss,
    )


def test_a_row_has_both_counts_of_flops_and_what_is_known() -> None:
    runs = (
        planned("done", rate=1e-3, hours=0.5, loss=3.25),
        planned("waits", rate=None, hours=None, loss=None),
    )
    table = plan_table(Prediction(runs=runs, workers=2))
    done, waits = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert done == {
        "run": "done",
        "parameters": "1.500M",
        "non-embedding": "1.000M",
        "tokens": "20.00M",
        "steps": "4,883",
        "FLOPs": "1.000e14",
        "FLOPs as run": "3.000e14",
        "rate": "0.001",
        "hours": "0.500",
        "loss": "3.2500",
    }
    assert (waits["rate"], waits["hours"], waits["loss"]) == ("tuned", "", "")


def test_the_summary_counts_what_is_left_alone() -> None:
    runs = (
        planned("done", rate=1e-3, hours=8.0, loss=3.25),
        planned("ready", rate=1e-3, hours=0.5, loss=None),
        planned("waits", rate=None, hours=1.5, loss=None),
    )
    assert plan_summary(Prediction(runs=runs, workers=1)) == (
        "3 runs, 2 of them to run: 6.000e14 FLOPs as run, about 2.00 hours with evaluations, "
        "1 at a time; 1 wait for a tuned rate, and a grid grows until its best is inside"
    )


def test_without_a_calibration_no_hours_are_told() -> None:
    runs = (planned("ready", rate=1e-3, hours=None, loss=None),)
    assert plan_summary(Prediction(runs=runs, workers=1)) == (
        "1 runs, 1 of them to run: 3.000e14 FLOPs as run"
    )

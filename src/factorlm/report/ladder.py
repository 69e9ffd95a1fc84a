"""A ladder's plan as a table and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorlm.report.tables import Table, format_count, format_scientific

if TYPE_CHECKING:
    from factorlm.scaling.ladder.prediction import PlannedRun, Prediction


def plan_table(prediction: Prediction) -> Table:
    """A row a run, with both counts of its FLOPs: the papers', and what is executed."""
    counts = ("parameters", "non-embedding", "tokens", "steps", "FLOPs", "FLOPs as run")
    rows = tuple(_row(run) for run in prediction.runs)
    return Table(header=("run", *counts, "rate", "hours", "loss"), rows=rows)


def plan_summary(prediction: Prediction) -> str:
    """What there is to do, in words."""
    left = [run for run in prediction.runs if run.loss is None]
    flops = format_scientific(sum(run.executed_training_flops for run in left))
    text = f"{len(prediction.runs)} runs, {len(left)} of them to run: {flops} FLOPs as run"
    if prediction.hours_left is not None:
        text += f", about {prediction.hours_left:.2f} hours with evaluations, "
        text += f"{prediction.workers} at a time"
    waiting = sum(run.learning_rate is None for run in left)
    if waiting:
        text += f"; {waiting} wait for a tuned rate, and a grid grows until its best is inside"
    return text


def _row(run: PlannedRun) -> tuple[str, ...]:
    counts = (run.num_params, run.num_non_embedding_params, run.num_tokens)
    return (
        run.name,
        *(format_count(count) for count in counts),
        f"{run.num_steps:,}",
        format_scientific(run.training_flops),
        format_scientific(run.executed_training_flops),
        "tuned" if run.learning_rate is None else f"{run.learning_rate:g}",
        "" if run.hours is None else f"{run.hours:.3f}",
        "" if run.loss is None else f"{run.loss:.4f}",
    )

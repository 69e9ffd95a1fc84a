"""Milliseconds of a training step of every row of reports/quality, timed alone and alternating.

What the runs of the queue took says nothing, since two of them and other work share the machine.
This times whole steps of the Trainer, rows taking turns, on one thread, with nothing beside it:

    python benchmarks/quality_steps.py --output reports/quality/steps.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _publish import publish
from quality import Plan, Run, load_losses, load_plan

from factorlm.measure import environment
from factorlm.records import RecordFile, StepRecord
from factorlm.train import TrainConfig
from factorlm.train.trainer import Trainer

WARM_UP = 2
STEPS = 6


def configs() -> dict[str, TrainConfig]:
    """Row, and ``<row> guided`` where it has a point G or F, as runs of a few steps."""
    values = load_plan()
    found: dict[str, TrainConfig] = {}
    for run in Plan(values, load_losses()).runs():
        row, _, point = run.name.removesuffix("-s0").rpartition("-")
        if run.name.endswith("-s0"):
            found[row] = few_steps(run, values["recipes"])
            if point in "GF":
                found[f"{row} guided"] = few_steps(run, values["recipes"], guided=True)
    return found


def alike(config: TrainConfig) -> str:
    """Rows that agree in this differ in the learning rate alone and take the same time."""
    plain: dict[str, Any] = config.to_dict()
    plain["optimizer"]["learning_rate"] = plain["name"] = None
    return json.dumps(plain)


def few_steps(run: Run, recipes: str, *, guided: bool = False) -> TrainConfig:
    """``run`` cut short, all of its steps with a guide or none."""
    plain: dict[str, Any] = run.config(recipes).to_dict()
    plain["batch"] |= {"num_steps": WARM_UP + STEPS, "num_tokens": None}
    plain["budget"]["flops"] = None
    variant = {"variant": "full", "share": 1.0} if guided else {"variant": "none", "share": None}
    plain["guide"] |= variant
    plain["eval"] = {"every_steps": None, "num_tokens": 1, "final_num_tokens": 1}
    return TrainConfig.from_dict(plain)


def step_ms(config: TrainConfig) -> float:
    """Median over the steps after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, runs_dir=folder)
        trainer.fit()
        steps = [r for r in RecordFile(trainer.run.records.path) if isinstance(r, StepRecord)]
    return statistics.median(step.step_ms for step in steps[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append the result as one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = configs()
    first = {alike(config): name for name, config in reversed(rows.items())}
    found: dict[str, list[float]] = {name: [] for name in reversed(first.values())}
    for _ in range(args.rounds):
        for name, values in found.items():
            values.append(round(step_ms(rows[name]), 2))
    medians = {
        name: statistics.median(found[first[alike(config)]]) for name, config in rows.items()
    }
    result = {
        "benchmark": "quality_steps",
        "environment": environment(torch.device("cpu")),
        "step_ms": found,
        "median_step_ms": medians,
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()

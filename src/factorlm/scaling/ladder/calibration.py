"""What a ladder will take here: a few training steps of every family and size, timed as they run.

They are runs like all others, by the same executor, as many at a time: what a machine does with one
run alone says little of two that share its memory. They stay in ``calibration/`` beside the runs
and are not run again on the same hardware.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from factorlm.errors import ConfigError, DataError, InterruptedRun
from factorlm.measure import environment
from factorlm.records import RECORDS_FILE, EvalRecord, RecordFile, RunRecord, StepRecord
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.executors import Executor
from factorlm.scaling.ladder.folder import LadderFolder
from factorlm.scaling.ladder.plan import LadderRun, Plan
from factorlm.scaling.ladder.queue import Queue
from factorlm.scaling.ladder.state import Failure, State
from factorlm.train.config import TrainConfig
from factorlm.train.facts import open_data

WARM_UP = 2
STEPS = 6
"""Timed, after the first ones."""
EVAL_STEPS = 2
"""Steps' worth of tokens to evaluate."""
RATE = 1e-3
"""Of these steps, whatever a run's own: it costs no time, and is not known before tuning."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one family at one size, of one run beside others."""

    flops_per_second: float
    """Executed in training."""
    eval_tokens_per_second: float
    num_validation_tokens: int
    """Of the whole split."""
    start_seconds: float
    """Of a run, beside its steps and evaluations: starting, and writing models. 0 where a cluster's
    queue would be in it."""

    def hours(self, executed_flops: float, num_eval_tokens: int) -> float:
        """Of a whole run."""
        seconds = executed_flops / self.flops_per_second + self.start_seconds
        return (seconds + num_eval_tokens / self.eval_tokens_per_second) / 3600


class CalibrationPlan(Plan):
    """A few unguided steps for each family and size."""

    def __init__(self, file: LadderFile, runs: Sequence[LadderRun]) -> None:
        super().__init__(file)
        first = {(run.family, run.size): run for run in reversed(runs)}
        self.few = [replace(run, config=few_steps(run), waits_for=()) for run in first.values()]

    def runs(self, losses: Mapping[str, float]) -> list[LadderRun]:
        """The same whatever the losses."""
        return self.few


def few_steps(run: LadderRun) -> TrainConfig:
    """The recipe of ``run`` for a few steps without a guide, and one small evaluation."""
    plain = run.config.to_dict()
    plain["name"] = f"{run.family}-{run.size}"
    plain["labels"]["stage"] = "calibration"
    plain["batch"] |= {"num_steps": WARM_UP + STEPS, "num_tokens": None}
    plain["optimizer"]["learning_rate"] = RATE
    plain["budget"]["flops"] = None
    plain["guide"] |= {"variant": "none", "share": None}
    count = EVAL_STEPS * run.config.tokens_per_step
    plain["eval"] |= {"every_steps": None, "num_tokens": count, "final_num_tokens": count}
    plain["checkpoint"]["every_steps"] = None
    return TrainConfig.from_dict(plain)


def calibrate(
    file: LadderFile,
    runs: Sequence[LadderRun],
    path: Path,
    executor: Executor,
    on_state: Callable[[State], None] = lambda state: None,
) -> dict[tuple[str, str], Speed]:
    """Speeds by (family, size). Raises ``ConfigError`` with the log of one that failed."""
    plan, folder = CalibrationPlan(file, runs), LadderFolder(path / "calibration")
    is_here = executor.section.kind == "local"
    for run in plan.few:
        if not _is_current(folder, run, is_here):
            shutil.rmtree(folder.path / run.name, ignore_errors=True)
    failures: list[Failure] = []
    queue = Queue(
        plan, folder, executor, on_state=on_state, on_failure=failures.append, poll_seconds=0.2
    )
    queue.run()
    if queue.was_stopped:
        raise InterruptedRun("stopped; what is calibrated is kept")
    if failures:
        found = failures[-1]
        raise ConfigError(
            f"calibration of {found.run.name} failed (exit code {found.exit_code}); the end of "
            f"{found.log}:\n{found.reason}"
        )
    done = [run for run in plan.few if (folder.path / run.name / RECORDS_FILE).exists()]
    return {(run.family, run.size): _speed(folder, run, is_here) for run in done}


def _is_current(folder: LadderFolder, run: LadderRun, is_here: bool) -> bool:
    """Whether there is a calibration of this very recipe, on this hardware if jobs run here."""
    path = folder.path / run.name / RECORDS_FILE
    if not path.exists():
        return False
    try:
        folder.loss(run)
    except (ConfigError, DataError):
        return False
    now = environment()
    for record in RecordFile(path):
        if isinstance(record, RunRecord):
            names = ("cpu", "num_cpu_cores", "torch")
            is_same = all(record.environment.get(name) == now.get(name) for name in names)
            return record.config["eval"] == run.config.eval.to_dict() and (is_same or not is_here)
    return False


def _speed(folder: LadderFolder, run: LadderRun, is_here: bool) -> Speed:
    path = folder.path / run.name / RECORDS_FILE
    records = list(RecordFile(path))
    steps = [record for record in records if isinstance(record, StepRecord)]
    evaluation = next(record for record in records if isinstance(record, EvalRecord))
    seconds = statistics.median(step.step_ms for step in steps[WARM_UP:]) / 1e3
    spent = steps[-1].executed_flops
    assert spent is not None
    # the recipe is written when the run is submitted, the last record when it ends
    whole = path.stat().st_mtime - folder.recipe(run).stat().st_mtime
    beside = whole - sum(step.step_ms for step in steps) / 1e3 - evaluation.seconds
    return Speed(
        flops_per_second=spent / len(steps) / seconds,
        eval_tokens_per_second=evaluation.num_eval_tokens / evaluation.seconds,
        num_validation_tokens=open_data(run.config).split("validation").num_tokens,
        start_seconds=max(0.0, beside) if is_here else 0.0,
    )

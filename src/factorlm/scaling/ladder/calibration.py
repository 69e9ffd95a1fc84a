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
from factorlm.records import RECORDS_FILE, RecordFile, RunRecord, StepRecord
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.executors import Executor
from factorlm.scaling.ladder.folder import LadderFolder
from factorlm.scaling.ladder.plan import LadderRun, Plan
from factorlm.scaling.ladder.queue import Queue
from factorlm.scaling.ladder.state import Failure, State
from factorlm.train.config import TrainConfig

WARM_UP = 2
STEPS = 6
"""Timed, after the first ones."""


@dataclass(frozen=True)
class Speed:
    """Of one family at one size, of one run beside others."""

    flops_per_second: float
    """Executed in training."""

    def hours(self, executed_flops: float) -> float:
        """Of a whole run, without its start and its evaluations."""
        return executed_flops / self.flops_per_second / 3600


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
    """The recipe of ``run`` for a few steps, without a guide and nearly without evaluation."""
    plain = run.config.to_dict()
    plain["name"] = f"{run.family}-{run.size}"
    plain["labels"]["stage"] = "calibration"
    plain["batch"] |= {"num_steps": WARM_UP + STEPS, "num_tokens": None}
    plain["budget"]["flops"] = None
    plain["guide"] |= {"variant": "none", "share": None}
    plain["eval"] |= {"every_steps": None, "num_tokens": 1, "final_num_tokens": 1}
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
    return {(run.family, run.size): _speed(folder, run) for run in done}


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
    then = [record.environment for record in RecordFile(path) if isinstance(record, RunRecord)]
    names = ("cpu", "num_cpu_cores", "torch")
    return bool(then) and (not is_here or all(then[0].get(n) == now.get(n) for n in names))


def _speed(folder: LadderFolder, run: LadderRun) -> Speed:
    path = folder.path / run.name / RECORDS_FILE
    steps = [record for record in RecordFile(path) if isinstance(record, StepRecord)]
    seconds = statistics.median(step.step_ms for step in steps[WARM_UP:]) / 1e3
    spent = steps[-1].executed_flops
    assert spent is not None
    return Speed(spent / len(steps) / seconds)

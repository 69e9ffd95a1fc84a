"""What a ladder's folder holds: runs that are done, those that are under way, and how far."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from factorlm.errors import DataError
from factorlm.records import (
    RECORDS_FILE,
    EvalRecord,
    EventRecord,
    MonitorRecord,
    Record,
    RecordFile,
    RunRecord,
    StepRecord,
)
from factorlm.scaling.ladder.executors import Job
from factorlm.scaling.ladder.plan import LadderRun
from factorlm.storage import LOCK_FILE, atomic_write_text
from factorlm.train.run import check_same_run

TAIL_BYTES = 8192
"""Read from the end of a run's records to see how far it is."""
STEPS_KEPT = 30
"""Of published records: every so many steps, beside the last one and all else but monitors."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    loss: float
    """Of that step, in training."""


class LadderFolder:
    """``<runs_dir>/<ladder>``: a folder a run, as ``factorlm train`` makes it, beside its recipe
    and its log; if they are published, ``records/`` elsewhere has the records of what is done."""

    def __init__(self, path: Path, records: Path | None = None) -> None:
        self.path = path
        self.records = records

    def recipe(self, run: LadderRun) -> Path:
        """Its resolved recipe."""
        return self.path / f"{run.name}.yaml"

    def log(self, run: LadderRun) -> Path:
        """What it prints."""
        return self.path / f"{run.name}.log"

    def stop_file(self, run: LadderRun) -> Path:
        """Once it is there, whatever trains the run saves and ends, on any machine, whoever
        started it."""
        return self.path / f".{run.name}.stop"

    def job(self, run: LadderRun, threads: int) -> Job:
        """What trains the run, of the recipe that ``write_recipe`` writes."""
        command = [sys.executable, "-m", "factorlm", "train", str(self.recipe(run).resolve())]
        return Job(
            name=run.name,
            command=(*command, "--runs-dir", str(self.path.resolve())),
            folder=Path.cwd(),
            log=self.log(run).resolve(),
            stop_file=self.stop_file(run).resolve(),
            env={"OMP_NUM_THREADS": str(threads)},
        )

    def write_recipe(self, run: LadderRun) -> Path:
        """So that anyone can run it by hand."""
        values = yaml.safe_dump(run.config.to_dict(), sort_keys=False, allow_unicode=True)
        atomic_write_text(self.recipe(run), values)
        return self.recipe(run)

    def loss(self, run: LadderRun) -> float | None:
        """The last validation loss of a run that is done; None if it is not.

        Raises ``ConfigError`` naming the fields that differ if what is there is another run, done
        or not, ``DataError`` if its records are damaged or end without an evaluation. A provisional
        rate is not compared.
        """
        for path in (self.path / run.name / RECORDS_FILE, self._published(run)):
            if path is None or not path.exists():
                continue
            config, loss = _done(path)
            if config is not None and not run.waits_for:
                check_same_run(path.parent, config, run.config.to_dict())
            if loss is not None:
                return loss
        return None

    def losses(self, runs: list[LadderRun]) -> dict[str, float]:
        """Of those that are done, by name."""
        found = {run.name: self.loss(run) for run in runs}
        return {name: loss for name, loss in found.items() if loss is not None}

    def publish(self, run: LadderRun) -> None:
        """Copy the records of a run that is done, with fewer steps, if they are to be published and
        are not yet."""
        target, source = self._published(run), self.path / run.name / RECORDS_FILE
        if target is None or target.exists() or not source.exists():
            return
        records = list(RecordFile(source))
        steps = [record.step for record in records if isinstance(record, StepRecord)]
        kept = [record.to_json() for record in records if _is_kept(record, max(steps, default=0))]
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(target, "\n".join([*kept, ""]))

    def progress(self, run: LadderRun) -> Progress | None:
        """From the last step in its records; None before the first."""
        path = self.path / run.name / RECORDS_FILE
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return None
        for line in reversed(lines):
            try:
                values = json.loads(line)
            except ValueError:
                continue  # cut off where the tail begins
            if values.get("type") == "step":
                return Progress(values["step"], values["loss"])
        return None

    def holder(self, run: LadderRun) -> int | None:
        """The process that trains this run now, whoever started it; 0 if it is not known which, or
        one of another machine. None if there is none."""
        path = self.path / run.name / LOCK_FILE
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _process(os.pread(descriptor, 4096, 0))
        finally:
            os.close(descriptor)
        return None

    def _published(self, run: LadderRun) -> Path | None:
        return None if self.records is None else self.records / f"{run.name}.jsonl"


def _done(path: Path) -> tuple[Mapping[str, object] | None, float | None]:
    """The config in a file of records, and the last validation loss if the run is finished."""
    config: Mapping[str, object] | None = None
    loss, finished = None, False
    for record in RecordFile(path):
        if isinstance(record, RunRecord):
            config = record.config
        elif isinstance(record, EvalRecord):
            loss = record.loss
        elif isinstance(record, EventRecord):
            finished = finished or record.event == "finished"
    if finished and loss is None:
        raise DataError(f"{path}: the run is finished without an evaluation")
    return config, loss if finished and loss is not None and math.isfinite(loss) else None


def _is_kept(record: Record, last: int) -> bool:
    if isinstance(record, StepRecord):
        return record.step % STEPS_KEPT == 0 or record.step == last
    return not isinstance(record, MonitorRecord)


def _process(note: bytes) -> int:
    try:
        values = json.loads(note)
        return int(values["pid"]) if values["host"] == socket.gethostname() else 0
    except (ValueError, KeyError, TypeError):
        return 0

"""Executors whose jobs end at once, and a queue on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from tests.run_records import run_record

from factorlm.records import EvalRecord, EventRecord, Record, RecordFile, StepRecord
from factorlm.scaling.ladder.config import ExecutorSection, LadderFile
from factorlm.scaling.ladder.executors import Executor, Handle, Job
from factorlm.scaling.ladder.folder import LadderFolder
from factorlm.scaling.ladder.plan import Plan
from factorlm.scaling.ladder.queue import Queue
from factorlm.scaling.ladder.state import Failure, State


def run_records(config: dict[str, object], loss: float, steps: int = 3) -> list[Record]:
    """What a finished run leaves."""
    run = run_record(str(config["name"]), config, num_steps=steps)
    done = [
        StepRecord(step=step, num_tokens=step, loss=loss, learning_rate=1, grad_norm=1, step_ms=1)
        for step in range(1, steps + 1)
    ]
    last = EvalRecord(
        step=steps,
        num_tokens=steps,
        source="validation",
        loss=loss,
        perplexity=1,
        bits_per_byte=None,
        num_eval_tokens=1,
        seconds=1,
    )
    return [run, *done, last, EventRecord(event="finished", step=steps)]


def append(path: Path, records: list[Record]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for record in records:
        RecordFile(path / "records.jsonl").append(record)


class Done(Handle):
    def __init__(self, code: int | None, stops: int | None = 75) -> None:
        self.code, self.stops = code, stops

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.code = self.stops if self.code is None else self.code


class Instant(Executor):
    """Writes the records of a finished run, or does as ``codes`` says for a name, in turn; with 75
    a run gets ``steps_each`` further."""

    def __init__(self, workers: int = 2, *, steps_each: int = 1, **codes: list[int | None]) -> None:
        super().__init__(ExecutorSection(workers=workers))
        self.steps_each = steps_each
        self.codes = {name.replace("_", "-"): values for name, values in codes.items()}
        self.jobs: list[Job] = []

    @property
    def slots(self) -> int:
        return self.section.workers or 1

    def submit(self, job: Job) -> Done:
        self.jobs.append(job)
        codes = self.codes.get(job.name, [])
        code = codes.pop(0) if codes else 0
        path = Path(job.command[-1]) / job.name
        if code == 0:
            config = yaml.safe_load(Path(job.command[4]).read_text())
            rate = config["optimizer"]["learning_rate"]
            append(path, run_records(config, loss=abs(math.log(rate / 2e-3)) + 1))
        elif code == 75:
            step = self.names.count(job.name) * self.steps_each
            append(path, run_records({"name": job.name}, 5.0, step)[1:-2])
        elif code is not None:
            job.log.write_text(f"first line\n{job.name} went wrong\n")
        return Done(code)

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.jobs]


class Refusing(Instant):
    """Takes a run only after it refused it as often as ``codes`` has values for its name."""

    def __init__(self, *, error: Exception | None = None, **codes: Any) -> None:
        super().__init__(**codes)
        self.error = error or RuntimeError("sbatch: error: Socket timed out")

    def submit(self, job: Job) -> Done:
        if self.codes.get(job.name):
            self.codes[job.name].pop()
            raise self.error
        return super().submit(job)


def run_queue(
    file: LadderFile, path: Path, executor: Instant, records: Path | None = None
) -> tuple[State, list[Failure]]:
    failures: list[Failure] = []
    queue = Queue(
        Plan(file),
        LadderFolder(path, records),
        executor,
        on_failure=failures.append,
        poll_seconds=0.001,
    )
    return queue.run(), failures

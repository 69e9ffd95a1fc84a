"""Runs what a ladder lacks, some at a time, until nothing is missing or someone stops it."""

from __future__ import annotations

import enum
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from factorlm.scaling.ladder.executors import Executor, Handle, Job
from factorlm.scaling.ladder.executors.base import INTERRUPTED
from factorlm.scaling.ladder.folder import LadderFolder, Progress
from factorlm.scaling.ladder.plan import LadderRun, Plan
from factorlm.storage import folder_lock

ATTEMPTS = 2
"""Of a run that fails."""
LOG_LINES = 8
"""Of a failed run, to show."""


class Status(enum.Enum):
    """Of a run, in words."""

    WAITING = "waits for its rate"
    READY = "to run"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    run: LadderRun
    exit_code: int
    log: Path
    last_lines: str
    is_final: bool
    """It was tried again already."""


@dataclass(frozen=True)
class State:
    """Of all runs at one moment."""

    runs: list[LadderRun]
    status: dict[str, Status]
    losses: dict[str, float]
    """Of those that are done."""
    progress: dict[str, Progress]
    """Of those that run."""

    def count(self, status: Status) -> int:
        """Runs of this status."""
        return sum(found is status for found in self.status.values())


class Orphan(Handle):
    """A run that a queue which is gone left running."""

    def __init__(self, folder: LadderFolder, run: LadderRun) -> None:
        self.folder, self.run = folder, run

    def poll(self) -> int | None:
        """None while its folder is held; after that the folder says what came of it."""
        return None if self.folder.holder(self.run) is not None else INTERRUPTED

    def stop(self) -> None:
        """As for a child, if it is a process of this machine."""
        pid = self.folder.holder(self.run)
        if pid:
            try:
                os.kill(pid, signal.SIGTERM)
            except OSError:
                return


class Queue:
    """Keeps an executor busy with what is missing; what is done is found in the folder."""

    def __init__(
        self,
        plan: Plan,
        folder: LadderFolder,
        executor: Executor,
        *,
        on_state: Callable[[State], None] = lambda state: None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
        poll_seconds: float = 1.0,
    ) -> None:
        self.plan, self.folder, self.executor = plan, folder, executor
        self.on_state, self.on_failure = on_state, on_failure
        self.poll_seconds = poll_seconds
        self.running: dict[str, tuple[LadderRun, Handle]] = {}
        self.attempts: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        """Of runs that are done, and infinite for those that failed for good."""
        self.stopping = False
        self.was_stopped = False
        """By a signal."""
        self._looked_for: set[tuple[str, bool]] = set()
        self._stop_file = folder.path / f".stop-{uuid.uuid4().hex}"

    def run(self) -> State:
        """Until nothing is left that can run, or a signal came: then runs save and end first.

        Raises ``ConfigError`` if the folder holds other runs by these names, ``StorageError`` if
        another queue has it.
        """
        with folder_lock(self.folder.path, owner="factorlm scale run"), self._signals():
            self._adopt()
            try:
                while True:
                    state = self._turn()
                    self.on_state(state)
                    if not self.running:
                        return state
                    time.sleep(self.poll_seconds)
            finally:
                self.stop()
                self._wait()
                self._stop_file.unlink(missing_ok=True)

    def stop(self) -> None:
        """Start nothing more, and ask what runs to save and end."""
        self.stopping = True
        for _, handle in self.running.values():
            handle.stop()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the queue for this block."""
        kinds = (signal.SIGINT, signal.SIGTERM)

        def stop(*_: object) -> None:
            self.was_stopped = True
            self.stop()

        old = {kind: signal.signal(kind, stop) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in old.items():
                signal.signal(kind, handler)

    def _adopt(self) -> None:
        """Wait for runs that are under way already, instead of starting them twice."""
        for run in self._runs():
            if self.folder.holder(run) is not None:
                self.running[run.name] = run, Orphan(self.folder, run)

    def _turn(self) -> State:
        """Take in what ended, start what may start, and say how things are."""
        self._collect()
        runs = self._runs()
        for run in runs:
            if self.stopping or len(self.running) >= self.executor.slots:
                break
            if self._status(run) is Status.READY:
                self.running[run.name] = run, self.executor.submit(self._job(run))
        status = {run.name: self._status(run) for run in runs}
        found = {run.name: self.folder.progress(run) for run, _ in self.running.values()}
        progress = {name: value for name, value in found.items() if value is not None}
        done = {name: loss for name, loss in self.losses.items() if math.isfinite(loss)}
        return State(runs, status, done, progress)

    def _runs(self) -> list[LadderRun]:
        """The plan with every loss that there is; it grows with the losses that it is given.

        A run is looked for in the folder when it comes up, and again when its rate is known.
        """
        while True:
            runs = self.plan.runs(self.losses)
            new = [run for run in runs if (run.name, bool(run.waits_for)) not in self._looked_for]
            if not new:
                return runs
            self._looked_for |= {(run.name, bool(run.waits_for)) for run in new}
            found = self.folder.losses(new)
            for run in new:
                if run.name in found:
                    self.folder.publish(run)
            self.losses |= found

    def _status(self, run: LadderRun) -> Status:
        if run.name in self.running:
            return Status.RUNNING
        if run.name in self.losses:
            return Status.DONE if math.isfinite(self.losses[run.name]) else Status.FAILED
        return Status.WAITING if run.waits_for else Status.READY

    def _collect(self) -> None:
        """Runs that ended: done, to go on with later, to try again, or failed for good."""
        for name, (run, handle) in list(self.running.items()):
            code = handle.poll()
            if code is None:
                continue
            del self.running[name]
            loss = self.folder.loss(run)
            if loss is not None:
                self.losses[name] = loss
                self.folder.publish(run)
            elif code != INTERRUPTED and not self.stopping:
                self._fail(run, code)

    def _fail(self, run: LadderRun, code: int) -> None:
        self.attempts[run.name] = self.attempts.get(run.name, 0) + 1
        is_final = self.attempts[run.name] >= ATTEMPTS
        if is_final:
            self.losses[run.name] = math.inf
        log = self.folder.log(run)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = "\n".join(line.rpartition("\r")[2] for line in lines[-LOG_LINES:])
        self.on_failure(Failure(run, code, log, last, is_final))

    def _job(self, run: LadderRun) -> Job:
        recipe = self.folder.write_recipe(run)
        command = [sys.executable, "-m", "factorlm", "train", str(recipe.resolve())]
        threads = str(self.executor.section.threads)
        return Job(
            name=run.name,
            command=(*command, "--runs-dir", str(self.folder.path.resolve())),
            folder=Path.cwd(),
            log=self.folder.log(run).resolve(),
            stop_file=self._stop_file.resolve(),
            env={"OMP_NUM_THREADS": threads},
        )

    def _wait(self) -> None:
        """Until what was asked to end has ended."""
        while self.running:
            self._collect()
            time.sleep(min(self.poll_seconds, 0.2))

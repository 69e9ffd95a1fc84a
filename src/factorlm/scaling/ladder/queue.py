"""Runs what a ladder lacks, some at a time, until nothing is missing or someone stops it."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from factorlm.errors import ConfigError, DataError
from factorlm.scaling.ladder.executors import Executor, Handle, Job
from factorlm.scaling.ladder.executors.base import INTERRUPTED
from factorlm.scaling.ladder.folder import LadderFolder
from factorlm.scaling.ladder.orphan import Orphan
from factorlm.scaling.ladder.plan import LadderRun, Plan
from factorlm.scaling.ladder.state import Failure, State, Status
from factorlm.storage import folder_lock

ATTEMPTS = 2
"""Of a run that fails."""
LOG_LINES = 8
"""Of a failed run, to show."""


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
        self.starts: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        """Starts that failed."""
        self.steps: dict[str, int] = {}
        """At which each run was when it was started."""
        self.losses: dict[str, float] = {}
        """Of runs that are done, and infinite for those that failed for good."""
        self.stopping = False
        self.was_stopped = False
        """By a signal."""
        self._looked_for: set[tuple[str, bool]] = set()

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
                    if not self.running and (self.stopping or not state.count(Status.READY)):
                        return state
                    time.sleep(self.poll_seconds)
            finally:
                self.stop()
                self._wait()

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
            elif self._status(run) is Status.READY:
                found = self.executor.find(self._job(run))
                if found is not None:
                    self.running[run.name] = run, found

    def _turn(self) -> State:
        """Take in what ended, start what may start, and say how things are."""
        self._collect()
        runs = self._runs()
        self._start(runs)
        status = {run.name: self._status(run) for run in runs}
        running = [run for run, _ in self.running.values()]
        found = {run.name: self.folder.progress(run) for run in running}
        return State(
            runs=runs,
            status=status,
            losses={name: loss for name, loss in self.losses.items() if math.isfinite(loss)},
            progress={name: value for name, value in found.items() if value is not None},
            num_steps={run.name: self.plan.describe(run).plan.num_steps for run in running},
        )

    def _start(self, runs: list[LadderRun]) -> None:
        """What may start, in the plan's order, but behind the others what was started before."""
        for run in sorted(runs, key=lambda run: self.starts[run.name]):
            if self.stopping or len(self.running) >= self.executor.slots:
                return
            if self._status(run) is Status.READY and not self._submit(run):
                return  # a cluster that is busy is asked again in the next turn

    def _submit(self, run: LadderRun) -> bool:
        """Whether the executor took the run. Raises ``ConfigError`` for what is wrong with all."""
        self.starts[run.name] += 1
        self.steps[run.name] = self._step(run)
        try:
            self.folder.write_recipe(run)
            self.folder.stop_file(run).unlink(missing_ok=True)
            handle = self.executor.submit(self._job(run))
        except ConfigError:
            raise
        except Exception as error:  # whatever a cluster's package raises
            self._fail(run, 1, f"it could not be submitted: {error}")
            return False
        self.running[run.name] = run, handle
        if self.stopping:  # a signal came meanwhile
            handle.stop()
        return True

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
            for run in new:
                if self.losses.get(run.name) != math.inf:
                    self._look(run)

    def _look(self, run: LadderRun) -> None:
        """Take in a run that is done. If its records are damaged, it failed for good."""
        try:
            loss = self.folder.loss(run)
        except DataError as error:
            self.attempts[run.name] = ATTEMPTS - 1
            self._fail(run, error.exit_code, str(error))
            return
        if loss is not None:
            self.losses[run.name] = loss
            self.folder.publish(run)

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
            self.folder.stop_file(run).unlink(missing_ok=True)
            self._look(run)
            if code and self.folder.holder(run) is not None:
                # an earlier queue's process was still starting when this one looked for it
                self.running[name] = run, Orphan(self.folder, run)
            if name in self.running or name in self.losses or self.stopping:
                continue
            # interrupted before its first new step is no way to get to the end
            if code != INTERRUPTED or self.steps.get(name) == self._step(run):
                self._fail(run, code)

    def _fail(self, run: LadderRun, code: int, reason: str | None = None) -> None:
        """Tell what went wrong: ``reason``, or the end of its log."""
        self.attempts[run.name] += 1
        is_final = self.attempts[run.name] >= ATTEMPTS
        if is_final:
            self.losses[run.name] = math.inf
        log = self.folder.log(run)
        self.on_failure(Failure(run, code, log, reason or _last_lines(log), is_final))

    def _step(self, run: LadderRun) -> int:
        found = self.folder.progress(run)
        return 0 if found is None else found.step

    def _job(self, run: LadderRun) -> Job:
        return self.folder.job(run, self.executor.section.threads)

    def _wait(self) -> None:
        """Until what was asked to end has ended."""
        while self.running:
            self._collect()
            time.sleep(min(self.poll_seconds, 0.2))


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(line.rpartition("\r")[2] for line in lines[-LOG_LINES:])

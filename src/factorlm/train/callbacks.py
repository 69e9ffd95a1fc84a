"""Hooks into a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorlm.records import (
    EvalRecord,
    EventRecord,
    MonitorRecord,
    Record,
    RunRecord,
    StepRecord,
)

if TYPE_CHECKING:
    from factorlm.train.trainer import Trainer


class Callback:
    """Called by the ``Trainer`` on the main process only. Override what you need."""

    def on_start(self, trainer: Trainer, run: RunRecord) -> None:
        """Before the first step of this process; the model is built and loaded."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After every optimizer step."""

    def on_eval_progress(self, trainer: Trainer, done: int, total: int) -> None:
        """After every batch of an evaluation: ``done`` of ``total``."""

    def on_eval(self, trainer: Trainer, record: EvalRecord) -> None:
        """After every evaluation."""

    def on_monitor(self, trainer: Trainer, record: MonitorRecord) -> None:
        """After every ``monitor.every_steps`` steps, if there are structured layers."""

    def on_event(self, trainer: Trainer, record: EventRecord) -> None:
        """When the run is resumed, saved, interrupted, stopped or finished, or its loss spikes."""

    def on_end(self, trainer: Trainer) -> None:
        """When ``fit`` returns or raises."""


class RecordWriter(Callback):
    """Appends every record to the run's ``records.jsonl`` as it happens."""

    def on_start(self, trainer: Trainer, run: RunRecord) -> None:
        records = trainer.run.records
        if not records.path.exists() or not any(isinstance(r, RunRecord) for r in records):
            self._write(trainer, run)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._write(trainer, record)

    def on_eval(self, trainer: Trainer, record: EvalRecord) -> None:
        self._write(trainer, record)

    def on_monitor(self, trainer: Trainer, record: MonitorRecord) -> None:
        self._write(trainer, record)

    def on_event(self, trainer: Trainer, record: EventRecord) -> None:
        self._write(trainer, record)

    def _write(self, trainer: Trainer, record: Record) -> None:
        trainer.run.records.append(record)

"""Ends training in the middle, as a signal does."""

from __future__ import annotations

import os
import signal

from factorlm.records import StepRecord
from factorlm.train.callbacks import Callback
from factorlm.train.trainer import Trainer


class StopAt(Callback):
    """Sends this process a signal after a step, or in the middle of an evaluation; what runs is the
    last."""

    def __init__(self, step: int, *, in_eval: bool = False) -> None:
        self.step, self.in_eval = step, in_eval

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step and not self.in_eval:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_eval_progress(self, trainer: Trainer, done: int, total: int) -> None:
        if trainer.state.step == self.step and self.in_eval and done == 2:
            assert total > 2
            os.kill(os.getpid(), signal.SIGUSR1)

"""The loss on the validation split while a run goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch

from factorlm.data import EvalBatch, EvalWindows, TokenDataset
from factorlm.distributed import World
from factorlm.eval.loss import EvalResult, evaluate_loss
from factorlm.hf.loss import CausalLMLoss
from factorlm.records import EvalRecord
from factorlm.train.signals import StopFlag
from factorlm.train.state import RunState


class _Stopped(Exception):  # noqa: N818 - it reports a signal, not a fault
    """A signal came during an evaluation."""


class Validation:
    """Evaluates ``module`` on the windows of ``dataset``'s validation split, over all processes.

    A signal on any process ends an evaluation on all at once.
    """

    def __init__(
        self,
        module: CausalLMLoss,
        dataset: TokenDataset,
        *,
        context_length: int,
        batch_size: int,
        world: World,
        stop: StopFlag,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._module = module
        self._windows = EvalWindows(
            dataset,
            context_length=context_length,
            batch_size=batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        self._tokens_per_batch = batch_size * context_length * world.size
        self._world = world
        self._stop = stop
        self._on_progress = on_progress

    def loss(self, num_tokens: int | None) -> EvalResult | None:
        """Over the first ``num_tokens`` of the split, None meaning all; None if a signal came."""
        windows = self._windows
        count = len(windows)
        if num_tokens is not None:
            count = min(count, math.ceil(num_tokens / self._tokens_per_batch))
        self._module.eval()
        try:
            return evaluate_loss(
                self._module,
                self._until_stopped(count),
                device=self._world.device,
                bytes_per_token=windows.num_text_bytes / windows.num_targets,
                add_up=self._world.sum_,
            )
        except _Stopped:
            return None
        finally:
            self._module.train()

    def _until_stopped(self, count: int) -> Iterator[EvalBatch]:
        """The first ``count`` batches, as long as no process has a signal."""
        for done, batch in enumerate(itertools.islice(self._windows, count)):
            flag = torch.tensor(float(bool(self._stop)), device=self._world.device)
            if self._world.sum_(flag).item() > 0:
                raise _Stopped
            yield batch
            self._on_progress(done + 1, count)


def eval_record(state: RunState, result: EvalResult, *, guided: bool) -> EvalRecord:
    """The record of ``result``, of the model as it is at ``state``."""
    return EvalRecord(
        step=state.step,
        num_tokens=state.num_tokens,
        source="validation",
        loss=result.loss,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        num_eval_tokens=result.num_tokens,
        seconds=result.seconds,
        guided=guided,
    )

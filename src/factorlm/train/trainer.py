"""The training loop: explicit, exact in resume, the same on one process and on many."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from factorlm.accounting import StepPlan, TrainingFlops
from factorlm.data import TokenLoader
from factorlm.distributed import World, peers_watched
from factorlm.errors import InterruptedRun, NumericError, StorageError
from factorlm.eval.loss import EvalResult
from factorlm.optim import build_optimizer, learning_rate_at
from factorlm.records import EventRecord, StepRecord
from factorlm.train.callbacks import Callback, RecordWriter
from factorlm.train.checkpoint import checkpoint_step
from factorlm.train.config import TrainConfig
from factorlm.train.describe import GUIDE_LEFT_OUT, describe
from factorlm.train.facts import open_data, resume_facts, run_record
from factorlm.train.metrics import trackers
from factorlm.train.monitor import Monitor
from factorlm.train.parallelize import autocast_dtype, gradients_held, parallelize_model
from factorlm.train.run import RunFolder
from factorlm.train.self_guided import Guidance
from factorlm.train.signals import StopFlag
from factorlm.train.spikes import WINDOW
from factorlm.train.state import RunState, non_finite_gradients, seed_step
from factorlm.train.validation import Validation, eval_record

MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail (a full disk, say) before the run stops."""


@dataclass(frozen=True)
class RunResult:
    """How ``Trainer.fit`` ended."""

    state: RunState
    path: Path
    """The run's folder."""
    already_finished: bool = False
    """Nothing was done: an earlier call had finished the run."""


class Trainer:
    """Runs one recipe in ``runs_dir/<name>``, or goes on with it where it stopped.

    ``fit`` does everything; callbacks see every step. The attributes below are there from the
    call of ``on_start`` on.
    """

    config: TrainConfig
    run: RunFolder
    world: World
    plan: StepPlan
    """How many steps there are, and which are guided."""
    checkpoint: Path | None
    """What this process went on from."""
    state: RunState
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    matmul_dtype: torch.dtype
    """The dtype of autocast; weights stay float32."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        runs_dir: str | os.PathLike[str] = "runs",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.run = RunFolder(Path(runs_dir) / config.name)
        self.state = RunState()
        self._callbacks = [RecordWriter(), *callbacks]

    def fit(self) -> RunResult:
        """Train until the last step, evaluate, and write ``model/``.

        Raises ``InterruptedRun`` after a signal and a complete checkpoint, ``NumericError`` before
        an update that is not finite, ``ConfigError`` where the folder holds another run.
        """
        parallel = self.config.parallel
        if parallel.num_threads is not None:
            torch.set_num_threads(parallel.num_threads)
        self.world = World.start(parallel.device, parallel.timeout_seconds)
        try:
            with StopFlag() as self._stop, peers_watched(self.world):
                return self._fit()
        finally:
            self.world.stop()

    def _fit(self) -> RunResult:
        # Before the folder is claimed: it refuses bad recipes.
        described = describe(self.config, num_processes=self.world.size)
        self.config, self.plan = described.config, described.plan
        if described.guide_left_out and self.world.is_main:
            warnings.warn(GUIDE_LEFT_OUT, stacklevel=2)
        with self.run.claimed(self.config, self.world):
            if self.run.is_finished(self.world):
                self.state = RunState(step=self.plan.num_steps)
                return RunResult(self.state, self.run.path, already_finished=True)
            self._run_record = run_record(described, self.world)
            self.checkpoint = self.run.newest_checkpoint(self.world)
            self._build()
            self._resume()
            if self.world.is_main:
                self._callbacks += trackers(self.config.tracking, self)
            try:
                self._call("on_start", self._run_record)
                if self.state.step:
                    self._event("resumed")
                self._loop()
                self._save_model("model")
                self._event("finished")
            finally:
                self._call("on_end")
        return RunResult(self.state, self.run.path)

    def _build(self) -> None:
        config, world = self.config, self.world
        self.dataset = open_data(config)
        first_step = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        guide = self.plan.guide
        guided = guide is not None and first_step < guide.num_steps
        assembled = parallelize_model(config, world, guided=guided)
        self.model, self._loss, self._module = assembled.model, assembled.loss, assembled.module
        self._guidance = Guidance(self.model, guide, world) if guide and guided else None
        options = config.optimizer.to_dict()
        self._clip = options.pop("clip_grad_norm") or float("inf")
        self.optimizer = build_optimizer(self.model, **options)
        self.matmul_dtype = autocast_dtype(config.parallel.precision, world.device)
        self.loader = TokenLoader(
            self.dataset,
            "train",
            context_length=config.data.context_length,
            sequences_per_step=config.batch.num_sequences,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
        )
        self._validation = Validation(
            self._loss,
            self.dataset,
            context_length=config.data.context_length,
            batch_size=config.eval.num_sequences or config.rows_per_forward(world.size),
            world=world,
            stop=self._stop,
            on_progress=lambda done, total: self._call("on_eval_progress", done, total),
        )

    def _resume(self) -> None:
        """Go back to the checkpoint, or start."""
        self._stopping = self._save_due = False
        self._failed_saves = 0
        self._facts = resume_facts(self.dataset, self.world)
        if self.checkpoint is not None:
            self.state = self.run.load_checkpoint(
                self.checkpoint, self.model, self.optimizer, self._facts, self.world
            )
        if self.world.is_main:
            self.run.records.drop_after(self.state.step, self.state.evaluated_step)
        self._monitor = Monitor(
            self.model,
            self.config.monitor.every_steps,
            self.world,
            max_grad_norm=self._clip,
            losses=self.run.losses(self.world, last=2 * WINDOW),
        )
        self._spent = self.plan.spent(self.state.step)
        self._saved_at = time.monotonic()

    def _loop(self) -> None:
        """Evaluate what is due, save what is due, stop if asked, else train one step."""
        while True:
            if self._eval_due() and not self._stopping:
                self._evaluate()
            done = self.state.step == self.plan.num_steps
            if self._stopping or done or self._save_due:
                self._save()
            if self._stopping:
                received = self._stop.received
                name = received.name if received else "a signal on another process"
                self._event("interrupted", signal=name)
                raise InterruptedRun(
                    f"stopped by {name} at step {self.state.step} of {self.plan.num_steps}; "
                    "the checkpoint is complete: run the same command to go on"
                )
            if done:
                return
            self._step()

    def _step(self) -> None:
        started = time.perf_counter()
        step = self.state.step
        rate = self._set_learning_rate(step)
        alpha, skipped = self._guidance.start_step(step) if self._guidance else (None, False)
        loss = self._backward(step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss_value, norm_value = self._agree(loss, norm)
        if not np.isfinite(loss_value) or not np.isfinite(norm_value):
            self._refuse_update(loss_value, norm_value)
        self._monitor.before_update(step + 1, loss_value, norm_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._end_guidance(step + 1)
        tokens = self.state.num_tokens + self.config.tokens_per_step
        spent = self._spend(skipped=alpha is None or skipped)
        seconds = time.perf_counter() - started
        self.state = self.state.replace(
            step=step + 1,
            num_tokens=tokens,
            train_seconds=self.state.train_seconds + seconds,
        )
        record = StepRecord(
            step=step + 1,
            num_tokens=tokens,
            loss=loss_value,
            learning_rate=rate,
            grad_norm=norm_value,
            step_ms=seconds * 1000,
            model_flops=spent.model_flops,
            executed_flops=spent.executed_flops,
            guide_alpha=alpha,
            guide_skipped=skipped,
        )
        spike, monitored = self._monitor.after_update(alpha)
        self._call("on_step", record)
        if spike is not None:
            self._call("on_event", spike)
        if monitored is not None:
            self._call("on_monitor", monitored)

    def _spend(self, *, skipped: bool) -> TrainingFlops:
        """The FLOPs of the run with those of one more step."""
        self._spent += self.plan.step
        if not skipped and self.plan.guided_step is not None:
            self._spent += self.plan.guided_step
        return self._spent

    def _end_guidance(self, num_steps: int) -> None:
        """Take the guides off once ``num_steps`` steps are done and α is 0."""
        if self._guidance and num_steps >= self._guidance.schedule.num_steps:
            self._guidance.end(self._module, self.optimizer)
            self._guidance = None

    def _set_learning_rate(self, step: int) -> float:
        schedule = self.config.schedule
        rate = learning_rate_at(
            step,
            self.plan.num_steps,
            peak=self.config.optimizer.learning_rate,
            kind=schedule.kind,
            warmup_ratio=schedule.warmup_ratio,
            final_ratio=schedule.final_ratio,
            decay_ratio=schedule.decay_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_multiplier"]
        return rate

    def _backward(self, step: int) -> Tensor:
        """Gradients of the mean loss of a whole step; the local sum of nats."""
        total = torch.zeros((), device=self.world.device)
        # Replicas average their gradients, so each scales its sum up by their number.
        scale = self.world.size / self.config.tokens_per_step
        batches = self._micro_batches(step)
        for index, (inputs, labels) in enumerate(batches):
            seed_step(self.config.seed, step, self.world.rank * len(batches) + index)
            with gradients_held(self._module, index == len(batches) - 1):
                with self._precision():
                    loss = self._module(inputs, labels)
                (loss * scale).backward()
            total += loss.detach()
        if self._guidance:
            self._guidance.reduce_gradients()
        return total

    def _micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        batch = torch.from_numpy(self.loader.batch(self.plan.data_step(step))).to(self.world.device)
        parts = batch.split(self.config.rows_per_forward(self.world.size))
        return [(rows[:, :-1], rows[:, 1:]) for rows in parts]

    def _precision(self) -> torch.autocast:
        enabled = self.matmul_dtype != torch.float32
        return torch.autocast(self.world.device.type, dtype=self.matmul_dtype, enabled=enabled)

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """The step's mean loss and gradient norm, and on all processes alike: stop? save?"""
        save = self.world.is_main and self._time_to_save()
        flags = torch.tensor([float(bool(self._stop)), float(save)], dtype=torch.float64)
        values = torch.cat([loss.double().reshape(1), flags.to(loss.device)])
        total, stop, save_now = self.world.sum_(values).tolist()
        self._stopping, self._save_due = stop > 0, save_now > 0
        return total / self.config.tokens_per_step, float(norm)

    def _time_to_save(self) -> bool:
        every = self.config.checkpoint.every_steps
        if every is not None:
            return (self.state.step + 1) % every == 0
        return time.monotonic() - self._saved_at > 60 * self.config.checkpoint.every_minutes

    def _refuse_update(self, loss: float, norm: float) -> None:
        """Stop before the update, naming the first gradients that are not finite."""
        bad = non_finite_gradients(self.model)
        step = self.state.step + 1
        self._event("not finite", loss=loss, grad_norm=norm, gradients=bad[:8])
        raise NumericError(
            f"step {step}: loss {loss}, gradient norm {norm}; gradients that are not finite: "
            f"{', '.join(bad[:8]) or 'none'}{' ...' if len(bad) > 8 else ''}. "
            "The update was not made"
        )

    def _eval_due(self) -> bool:
        step, every = self.state.step, self.config.eval.every_steps
        if step == self.state.evaluated_step:
            return False
        return step == self.plan.num_steps or (every is not None and step % every == 0)

    def _evaluate(self) -> None:
        """The loss on ``eval.num_tokens``, which chooses the best model; at the end on more text.

        A guided model is evaluated with its guides, and is never the best: no model folder holds
        guides. A signal leaves it to the resumed run.
        """
        if self._guidance:
            self._guidance.start_step(self.state.step)
        num_tokens, final = self.config.eval.num_tokens, self.config.eval.final_num_tokens
        part = self._validation_loss(num_tokens)
        if part is None:
            return
        results, is_last = [part], self.state.step == self.plan.num_steps
        if is_last and num_tokens != final:
            whole = self._validation_loss(final)
            if whole is None:
                return
            results.append(whole)
        self.state = self.state.replace(evaluated_step=self.state.step)
        best = self.state.best_loss
        is_best = not self._guidance and (best is None or part.loss < best)
        if is_best and self._saved(lambda: self._save_model("model-best"), is_last=is_last):
            self.state = self.state.replace(best_loss=part.loss)
        for result in results:
            record = eval_record(self.state, result, guided=self._guidance is not None)
            self._call("on_eval", record)

    def _validation_loss(self, num_tokens: int | None) -> EvalResult | None:
        """Over the first ``num_tokens`` of the split; None if a signal came."""
        with self._precision():
            result = self._validation.loss(num_tokens)
        self._stopping = result is None
        return result

    def _save(self) -> None:
        """Write a checkpoint."""
        if self._saved(self._save_checkpoint, is_last=self._stopping):
            self._event("saved")
        self._saved_at, self._save_due = time.monotonic(), False

    def _saved(self, save: Callable[[], None], *, is_last: bool) -> bool:
        """Whether ``save`` succeeds. A failure is fatal in the last one, or the third time
        running."""
        try:
            save()
        except StorageError as error:
            self._failed_saves += 1
            if is_last or self._failed_saves == MAX_FAILED_SAVES:
                raise
            self._event("save failed", error=str(error))
            return False
        self._failed_saves = 0
        return True

    def _save_checkpoint(self) -> None:
        keep = self.config.checkpoint.keep
        self.run.save_checkpoint(
            self.model, self.optimizer, self.state, self._facts, self.world, keep=keep
        )

    def _save_model(self, name: str) -> None:
        self.run.save_model(name, self.model, self.dataset.tokenizer_folder, self.world)

    def _call(self, hook: str, *args: object) -> None:
        if self.world.is_main:
            for callback in self._callbacks:
                getattr(callback, hook)(self, *args)

    def _event(self, event: str, **detail: object) -> None:
        self._call("on_event", EventRecord(event=event, step=self.state.step, detail=detail))

"""A run of the Hugging Face ``Trainer`` on a budget of FLOPs: its steps, its rows, its checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from factorlm.accounting import (
    StepPlan,
    guide_flops,
    plan_guided,
    plan_without_guide,
    training_flops,
)
from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.hf.self_guided import SelfGuidedTraining
from factorlm.layers.self_guided import GuideForm
from factorlm.optim.guidance import GuideKind, GuideSchedule, GuideVariant
from factorlm.surgery import guided_layers, stock_model


def plan_for_budget(
    model: PreTrainedModel,
    *,
    num_original_steps: int,
    rows_per_step: int,
    seq_len: int,
    budget_flops: float | None = None,
    control: bool = False,
    kind: GuideKind = "cosine",
    variant: GuideVariant = "full",
    seed: int = 0,
) -> TrainerPlan:
    """Plan self-guided training at fixed FLOPs (arXiv 2407.09835, section 4) for the ``Trainer``::

        plan = plan_for_budget(model, num_original_steps=1000, rows_per_step=64, seq_len=512)
        args = TrainingArguments(
            max_steps=plan.num_steps, train_sampling_strategy="sequential", ...
        )
        Trainer(
            model=model,
            args=args,
            train_dataset=plan.dataset(data),
            callbacks=plan.callbacks(),
        )

    Args:
        model: structured, without guides; on any device, meta included.
        num_original_steps: optimizer steps of the structured model's own run.
        rows_per_step: sequences of an optimizer step, over all devices and accumulated batches.
        seq_len: tokens of a sequence.
        budget_flops: training FLOPs of the whole run. None: what the original steps take with
            every structured layer dense.
        control: no guide; the budget buys more steps, on new data.
        kind: of the guide's schedule, as in ``GuideSchedule``; so are
        variant: which steps run the guide, and
        seed: of the choice of these steps.

    FLOPs are ``TrainingFlops.model_flops``, the papers' convention. Executed ones are not a budget
    here: they depend on the optimizer and the batch of a device, which the ``Trainer`` is told
    after the plan is made. The steps are those of ``factorlm train`` with the same numbers and
    ``budget.count: model_flops``.

    Raises ``ConfigError`` for values out of range, a model with guides or with nothing to guide,
    and a budget that leaves nothing for a guide or guides more steps than there are.
    """
    check(num_original_steps >= 1, f"{num_original_steps=} must be at least 1")
    check(rows_per_step >= 1, f"{rows_per_step=} must be at least 1")
    valid = budget_flops is None or 0 < budget_flops < math.inf
    check(valid, f"{budget_flops=} must be above 0 and finite")
    check(not guided_layers(model), "the model has guides: make the plan before attach_guides_")
    num_tokens = rows_per_step * seq_len
    step = training_flops(model, seq_len=seq_len, num_tokens=num_tokens)
    budget = budget_flops
    if budget is None:
        budget = num_original_steps * _dense_flops(model, seq_len, num_tokens)
    guide = GuideSchedule(num_steps=1, kind=kind, variant=variant, seed=seed)
    with _errors_name_arguments():
        if control:
            steps = plan_without_guide(num_original_steps, step, budget=budget)
        else:
            guided = guide_flops(model, tokens_per_step=num_tokens, tokens_per_forward=num_tokens)
            steps = plan_guided(num_original_steps, step, guided, guide, budget=budget)
    return TrainerPlan(steps, rows_per_step)


def _dense_flops(model: PreTrainedModel, seq_len: int, num_tokens: int) -> int:
    """Of a step of ``model`` with every structured layer dense."""
    with torch.device("meta"):
        dense = stock_model(model)
    return training_flops(dense, seq_len=seq_len, num_tokens=num_tokens).model_flops


@contextmanager
def _errors_name_arguments() -> Iterator[None]:
    """Errors inside name the arguments where they name a recipe's fields."""
    try:
        yield
    except ConfigError as error:
        message = str(error).replace("budget.flops", "budget_flops")
        message = message.replace("batch.num_tokens", "num_original_steps")
        raise ConfigError(message) from None


@dataclass(frozen=True)
class TrainerPlan:
    """What a ``Trainer`` is to be given for a run on a budget; ``plan_for_budget`` makes it."""

    steps: StepPlan
    """Which steps are guided, which are replayed, and what all cost."""
    rows_per_step: int
    """Sequences of an optimizer step: the arguments' ``per_device_train_batch_size`` x
    ``gradient_accumulation_steps`` x processes."""

    @property
    def num_steps(self) -> int:
        """The arguments' ``max_steps``."""
        return self.steps.num_steps

    def dataset(self, data: Any, *, data_seed: int | None = 42) -> PlannedDataset:
        """The rows of the whole run, replayed ones included, in training order.

        ``data`` has a length and rows by number. Each epoch is shuffled as the ``Trainer`` shuffles
        for that ``data_seed`` (by default its ``seed``, 42), but goes on within a step, so that
        every step is full; None keeps the order of ``data``. Raises ``ConfigError`` for data
        without rows or without a length.
        """
        return PlannedDataset(data, self, data_seed)

    def callbacks(self, *, form: GuideForm = "auto") -> list[TrainerCallback]:
        """Checks that the ``Trainer`` follows the plan and, except for the control,
        ``SelfGuidedTraining`` with its guided steps; ``form`` is that of ``SelfGuidedLinear``."""
        checks, guide = _PlanChecks(self), self.steps.guide
        if guide is None:
            return [checks]
        guidance = SelfGuidedTraining(
            num_steps=guide.num_steps,
            kind=guide.kind,
            variant=guide.variant,
            form=form,
            seed=guide.seed,
        )
        return [checks, guidance]


class PlannedDataset(Dataset[Any]):
    """The rows of a planned run, one epoch to the ``Trainer``, which must not shuffle them."""

    def __init__(self, data: Any, plan: TrainerPlan, data_seed: int | None) -> None:
        sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        check(sized, f"data={type(data).__name__} must have a length and rows by number")
        check(len(data) >= 1, "data must have a row at least")
        self.data = data
        self.plan = plan
        self.data_seed = data_seed

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.rows_per_step

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, place = divmod(index, self.plan.rows_per_step)
        position = self.plan.steps.data_step(step) * self.plan.rows_per_step + place
        epoch, row = divmod(position, len(self.data))
        if self.data_seed is not None:
            row = int(_shuffled(len(self.data), self.data_seed + epoch)[row])
        return self.data[row]


@lru_cache(maxsize=1)
def _shuffled(num_rows: int, seed: int) -> Tensor:
    """As accelerate's ``SeedableRandomSampler`` does, which is what the ``Trainer`` shuffles by."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


class _PlanChecks(TrainerCallback):
    """Raises ``ConfigError`` before a ``Trainer`` trains on something other than its plan."""

    def __init__(self, plan: TrainerPlan) -> None:
        self.plan = plan

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        *,
        train_dataloader: Any,
        **others: object,
    ) -> None:
        """Check the steps, the rows of a step, and that they are read in order."""
        plan, data = self.plan, train_dataloader.dataset
        check(
            state.max_steps == plan.num_steps,
            f"max_steps={state.max_steps} must be the plan's num_steps={plan.num_steps}",
        )
        check(
            isinstance(data, PlannedDataset) and data.plan == plan,
            f"train_dataset={type(data).__name__} must be what this plan's dataset() made",
        )
        rows = train_dataloader.total_batch_size * args.gradient_accumulation_steps
        check(
            rows == plan.rows_per_step,
            f"per_device_train_batch_size={args.per_device_train_batch_size} x "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} over all processes is "
            f"{rows} rows a step, which must be the plan's rows_per_step={plan.rows_per_step}",
        )
        _check_order(args)


def _check_order(args: TrainingArguments) -> None:
    strategy = args.train_sampling_strategy
    check(
        strategy == "sequential",
        f"train_sampling_strategy={strategy!r} must be 'sequential': the plan's data set is in "
        "training order",
    )
    in_order = getattr(args, "dataloader_in_order", True)  # transformers 5.3 has no such field
    check(in_order, "dataloader_in_order=False must be True: replayed steps follow the order")
    check(
        not args.ignore_data_skip,
        "ignore_data_skip=True must be False: a resumed run goes on with the rows of its step",
    )

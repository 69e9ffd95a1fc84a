"""What a recipe builds and costs, without allocating a weight."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from factorlm.accounting import (
    FlopCount,
    MemoryEstimate,
    ParamCount,
    StepPlan,
    TrainingFlops,
    count_params,
    estimate_memory,
    flops_per_token,
    guide_flops,
    plan_guided,
    plan_without_guide,
    solved_guide_steps,
    training_flops,
)
from factorlm.optim import GuideSchedule
from factorlm.surgery import SwapReport, SwapRow, attach_guides_
from factorlm.train.assemble import build_model
from factorlm.train.config import GuideSection, TrainConfig
from factorlm.train.parallelize import autocast_dtype

GUIDE_LEFT_OUT = (
    "trained without a guide: guide.variant='auto' has one where the FLOPs of the budget, by "
    "default those of the dense counterpart, leave a step for it"
)


@dataclass(frozen=True)
class Description:
    """A recipe's model and its costs."""

    config: TrainConfig
    """With what ``guide.variant: auto`` means, so that a run's own config says it."""
    guide_left_out: bool
    """``auto`` means ``none`` here, since the FLOPs leave no step for a guide."""
    architecture: str
    """The Hugging Face class."""
    params: ParamCount
    forward: FlopCount
    """Of one token in a sequence of ``data.context_length``."""
    plan: StepPlan
    """The run's steps, and which of them are guided."""
    micro_batch: int
    """Sequences of one forward pass."""
    memory: MemoryEstimate
    """Of one process that holds the whole model, with the guides that a run begins with."""
    precision: str
    """What ``parallel.precision`` means on this machine: ``fp32`` or ``bf16``."""
    swaps: SwapReport | None
    """None for a dense model."""

    @property
    def training(self) -> TrainingFlops:
        """Of the whole run; guided steps as expected over seeds."""
        return self.plan.total

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run: those of its whole steps, replayed ones included."""
        return self.plan.num_steps * self.config.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with stable keys and a unit in every name: ``docs/reference/describe.md``."""
        return {
            "name": self.config.name,
            "architecture": self.architecture,
            "structure": dict(self.config.structure),
            "num_params": self.params.total,
            "num_weight_params": self.params.weights,
            "num_ffn_params": self.params.ffn,
            "num_non_embedding_params": self.params.non_embedding,
            "num_params_by_part": dataclasses.asdict(self.params),
            "forward_flops_per_token": self.forward.total,
            "forward_flops_per_token_by_part": dataclasses.asdict(self.forward),
            "training_flops": self.training.model_flops,
            "executed_training_flops": self.training.executed_flops,
            "num_steps": self.plan.num_steps,
            "num_original_steps": self.plan.num_original_steps,
            "num_guide_steps": 0 if self.plan.guide is None else self.plan.guide.num_steps,
            "tokens_per_step": self.config.tokens_per_step,
            "num_tokens": self.num_tokens,
            "memory": dataclasses.asdict(self.memory)
            | {"step_bytes": self.memory.step_bytes}
            | {"micro_batch_sequences": self.micro_batch, "precision": self.precision},
            "swaps": None if self.swaps is None else _swaps(self.swaps),
        }


@dataclass(frozen=True)
class SwapGroup:
    """Layers that were swapped alike."""

    num_layers: int
    row: SwapRow
    """One of them."""


def group_swaps(report: SwapReport) -> list[SwapGroup]:
    """``report`` with one entry for all layers of the same kinds and sizes."""
    alike = {dataclasses.replace(row, name=""): row for row in reversed(report.rows)}
    counts = Counter(dataclasses.replace(row, name="") for row in report.rows)
    return [SwapGroup(number, alike[key]) for key, number in counts.items()]


def describe(config: TrainConfig, *, num_processes: int = 1) -> Description:
    """Build ``config``'s model on the meta device and count. Raises ``ConfigError``."""
    model, swaps = build_model(config)
    is_auto = config.guide.variant == "auto"
    config = _settle_guide(config, model) if is_auto else config
    params, plan = count_params(model), plan_steps(config, model, num_processes=num_processes)
    micro_batch = config.rows_per_forward(num_processes)
    forward = flops_per_token(model, config.data.context_length)
    if plan.guide is not None:
        attach_guides_(model)
    return Description(
        config=config,
        guide_left_out=is_auto and config.guide.variant == "none",
        architecture=type(model).__name__,
        params=params,
        forward=forward,
        plan=plan,
        micro_batch=micro_batch,
        memory=_memory(config, model, micro_batch),
        precision=_precision(config),
        swaps=swaps,
    )


def plan_steps(config: TrainConfig, model: PreTrainedModel, *, num_processes: int = 1) -> StepPlan:
    """The steps of ``config``'s run; ``model`` is its model without guides, on any device.

    How many there are follows from what is learned: a budget is solved as for one process and
    without what activation checkpointing computes again, since a resumed run may change both. The
    costs in the plan are those of ``num_processes``, recomputed activations included.
    """
    plan = _solve(_without_recomputing(config), model)
    guided = None if plan.guide is None else _guided_step_flops(config, model, num_processes)
    return dataclasses.replace(plan, step=_step_flops(config, model), guided_step=guided)


def _settle_guide(config: TrainConfig, model: PreTrainedModel) -> TrainConfig:
    """What ``auto`` means for ``model``: a guide, unless the budget leaves no step for one."""
    guided = config.with_guide()
    plain = _without_recomputing(guided)
    flops = _budget_flops(plain)
    if flops is not None:
        steps = solved_guide_steps(
            plain.num_steps,
            _step_flops(plain, model),
            _guided_step_flops(plain, model),
            flops,
            variant="full",
            count=plain.budget.count,
        )
        if steps < 1:
            return config.replace(guide=config.guide.replace(variant="none"))
    return guided


def _without_recomputing(config: TrainConfig) -> TrainConfig:
    return config.replace(parallel=config.parallel.replace(activation_checkpointing=False))


def _budget_flops(config: TrainConfig) -> float | None:
    """``budget.flops`` as a number."""
    budget = config.budget
    if budget.flops != "dense":
        return budget.flops
    dense, _ = build_model(config.replace(structure={}, guide=GuideSection()))
    return float(getattr(_step_flops(config, dense), budget.count) * config.num_steps)


def _solve(config: TrainConfig, model: PreTrainedModel) -> StepPlan:
    section, budget = config.guide, config.budget
    step, flops = _step_flops(config, model), _budget_flops(config)
    if section.variant == "none":
        return plan_without_guide(config.num_steps, step, budget=flops, count=budget.count)
    assert section.variant != "auto"  # describe says what it means
    guide = GuideSchedule(
        num_steps=max(round((section.share or 1.0) * config.num_steps), 1),
        kind=section.schedule,
        variant=section.variant,
        seed=config.seed,
    )
    guided_step = _guided_step_flops(config, model)
    return plan_guided(config.num_steps, step, guided_step, guide, budget=flops, count=budget.count)


def _memory(config: TrainConfig, model: PreTrainedModel, micro_batch: int) -> MemoryEstimate:
    return estimate_memory(
        model,
        micro_batch=micro_batch,
        seq_len=config.data.context_length,
        precision=_precision(config),
        activation_checkpointing=config.parallel.activation_checkpointing,
        optimizer=config.optimizer.kind,
    )


def _step_flops(config: TrainConfig, model: PreTrainedModel) -> TrainingFlops:
    return training_flops(
        model,
        seq_len=config.data.context_length,
        num_tokens=config.tokens_per_step,
        num_steps=1,
        optimizer=config.optimizer.kind,
        activation_checkpointing=config.parallel.activation_checkpointing,
    )


def _guided_step_flops(
    config: TrainConfig, model: PreTrainedModel, num_processes: int = 1
) -> TrainingFlops:
    return guide_flops(
        model,
        tokens_per_step=config.tokens_per_step,
        tokens_per_forward=config.rows_per_forward(num_processes) * config.data.context_length,
        optimizer=config.optimizer.kind,
        form=config.guide.form,
        activation_checkpointing=config.parallel.activation_checkpointing,
        num_processes=num_processes,
    )


def _precision(config: TrainConfig) -> Literal["fp32", "bf16"]:
    name = config.parallel.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = autocast_dtype(config.parallel.precision, torch.device(name))
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _swaps(report: SwapReport) -> dict[str, Any]:
    groups = [
        {"num_layers": group.num_layers, "param_ratio": group.row.param_ratio}
        | {f"example_{k}" if k == "name" else k: v for k, v in vars(group.row).items()}
        for group in group_swaps(report)
    ]
    return {
        "num_layers": len(report.rows),
        "before_params": report.before_params,
        "after_params": report.after_params,
        "param_ratio": report.param_ratio,
        "groups": groups,
        "num_untouched_expert_params": sum(site.num_params for site in report.untouched),
    }

"""What a recipe builds and costs, without allocating a weight."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from factorlm.accounting import (
    FlopCount,
    MemoryEstimate,
    ParamCount,
    TrainingFlops,
    count_params,
    estimate_memory,
    flops_per_token,
    training_flops,
)
from factorlm.surgery import SwapReport, SwapRow
from factorlm.train.assemble import build_model
from factorlm.train.config import TrainConfig
from factorlm.train.parallelize import autocast_dtype


@dataclass(frozen=True)
class Description:
    """A recipe's model and its costs."""

    config: TrainConfig
    architecture: str
    """The Hugging Face class."""
    params: ParamCount
    forward: FlopCount
    """Of one token in a sequence of ``data.context_length``."""
    training: TrainingFlops
    """Of the whole run."""
    memory: MemoryEstimate
    """Of one process that holds the whole model."""
    precision: str
    """What ``parallel.precision`` means on this machine: ``fp32`` or ``bf16``."""
    swaps: SwapReport | None
    """None for a dense model."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run: those of its whole steps."""
        return self.config.num_steps * self.config.tokens_per_step

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass."""
        return self.config.batch.micro_batch or self.config.batch.num_sequences

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with stable keys and a unit in every name; see ``docs/reference/cli.md``."""
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
            "num_steps": self.config.num_steps,
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


def describe(config: TrainConfig) -> Description:
    """Build ``config``'s model on the meta device and count. Raises ``ConfigError``."""
    model, swaps = build_model(config)
    seq_len = config.data.context_length
    recompute = config.parallel.activation_checkpointing
    precision = _precision(config)
    return Description(
        config=config,
        architecture=type(model).__name__,
        params=count_params(model),
        forward=flops_per_token(model, seq_len),
        training=training_flops(
            model,
            seq_len=seq_len,
            num_tokens=config.num_steps * config.tokens_per_step,
            activation_checkpointing=recompute,
        ),
        memory=estimate_memory(
            model,
            micro_batch=config.batch.micro_batch or config.batch.num_sequences,
            seq_len=seq_len,
            precision="bf16" if precision == torch.bfloat16 else "fp32",
            activation_checkpointing=recompute,
        ),
        precision="bf16" if precision == torch.bfloat16 else "fp32",
        swaps=swaps,
    )


def _precision(config: TrainConfig) -> torch.dtype:
    name = config.parallel.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return autocast_dtype(config.parallel.precision, torch.device(name))


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

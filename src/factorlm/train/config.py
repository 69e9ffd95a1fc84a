"""The recipe: everything that a training run is, as one tree of frozen configs (torch-free)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from factorlm.config import Config, check


def _at_least_one(section: str, config: Config, *names: str) -> None:
    """Refuse a count of ``section`` that is stated and under 1."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= 1, f"{section}.{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelSection(Config):
    """Which Transformer, before its FFN is structured."""

    preset: str | None = None
    """A preset's name (``gpt_tiny``, ``gpt_s``, ``llama_m``, ...), or a model folder whose
    architecture is taken without its weights."""
    vocab_size: int = 32000
    """Rows of the embedding. At least the tokenizer's vocabulary."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config to change, e.g. ``num_hidden_layers: 6``."""
    init_from: str | None = None
    """Start from the weights of this run, model folder or Hub id instead of a preset."""

    def __post_init__(self) -> None:
        _at_least_one("model", self, "vocab_size")
        check(
            self.preset is None or self.init_from is None,
            f"model.preset={self.preset!r} and model.init_from={self.init_from!r}: name only one "
            "(--model.preset null takes the recipe's preset away)",
        )


@dataclass(frozen=True, kw_only=True)
class DataSection(Config):
    """What the run trains on: a folder that ``factorlm prepare`` wrote."""

    path: str = ""
    """The prepared folder."""
    context_length: int = 1024
    """L, the tokens that one sequence predicts."""
    source: list[str] = field(default_factory=list)
    """Where the text comes from: what ``factorlm prepare`` is given if ``path`` is not there."""
    tokenizer: str = ""
    """The tokenizer that ``factorlm prepare`` is given if ``path`` is not there."""

    def __post_init__(self) -> None:
        _at_least_one("data", self, "context_length")


@dataclass(frozen=True, kw_only=True)
class GuideSection(Config):
    """Self-guided training: a dense guide beside every structured layer, for a part of the run."""

    variant: Literal["auto", "none", "full", "stochastic"] = "auto"
    """``full``: the guide runs in every step while it is there; ``stochastic``: with probability α,
    which halves its cost; ``none``: the control. ``auto``: ``full`` for a structured model with
    fresh weights, within the executed FLOPs of its dense counterpart where neither ``share`` nor
    ``budget.flops`` is stated (reports/quality), if these leave a step for it; else ``none``."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the guide's share α goes from 1 to 0."""
    share: float | None = None
    """Share of the steps that have a guide (fixed-step mode). None: solved for ``budget.flops``
    (fixed-FLOP mode), with the guided tokens replayed at the end."""
    form: Literal["auto", "merged", "two_path"] = "auto"
    """How a guided pass is computed; ``auto``: whichever takes fewer FLOPs."""

    def __post_init__(self) -> None:
        share = self.share
        check(share is None or 0 < share <= 1, f"guide.share={share} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class BudgetSection(Config):
    """What the whole run may cost, in place of the number of steps that ``batch`` states."""

    flops: float | Literal["dense"] | None = None
    """Training FLOPs of the whole run; ``dense``: those of the same run with its FFN dense. With a
    guide they are met by its share, without one by more tokens. None: no budget."""
    count: Literal["model_flops", "executed_flops"] = "model_flops"
    """Which FLOPs: the papers' convention, or what is run, merged guides and the optimizer's
    matmuls included; not what ``parallel.activation_checkpointing`` computes again."""

    def __post_init__(self) -> None:
        flops = self.flops
        valid = flops is None or isinstance(flops, str) or 0 < flops < math.inf
        check(valid, f"budget.flops={flops} must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(Config):
    """How weights are updated; decay is decoupled."""

    kind: str = "muon"
    """``adamw`` (fused where PyTorch has it); ``muon``: Muon on hidden matrices, AdamW on the rest;
    ``spectron``, ``lora_muon``: that rule on pairs of factors, Muon on other hidden matrices, AdamW
    on the rest."""
    learning_rate: float = 8e-3
    """The peak. At the size and budget of reports/quality a dense model is best at 8e-3 with Muon
    and with AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    """Of Muon, Spectron and LoRA-Muon."""
    factor_rates: Literal["equal", "structure_aware"] = "equal"
    """``structure_aware``: AdamW's rate of each factor times (in_features / fan_in) / number of
    factors (Compute Better Spent)."""
    base_width: int | None = None
    """With ``structure_aware``: the hidden size at which the rate was tuned; hidden matrices of
    another width W get base_width / W times the rate."""
    weight_decay: float = 0.1
    """Each step subtracts learning rate x weight_decay x parameter, without a factor's multiple."""
    decay: Literal["matrices", "all"] = "matrices"
    """``matrices``: no decay on biases and norms; ``all``: the papers' rule."""
    clip_grad_norm: float | None = 1.0
    """Largest global gradient norm; null turns clipping off."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        check(0 < rate < math.inf, f"optimizer.learning_rate={rate} must be above 0 and finite")
        for beta in self.betas:
            check(0 <= beta < 1, f"optimizer.betas={self.betas} must lie in [0, 1)")
        decay = self.weight_decay
        check(
            0 <= decay < math.inf, f"optimizer.weight_decay={decay} must be at least 0 and finite"
        )
        aware = self.factor_rates == "structure_aware"
        check(
            not aware or self.kind == "adamw",
            f"optimizer.factor_rates={self.factor_rates!r} is for optimizer.kind='adamw', "
            f"not {self.kind!r}",
        )
        width = self.base_width
        check(
            width is None or (aware and width >= 1),
            f"optimizer.base_width={width} must be at least 1, beside "
            "optimizer.factor_rates='structure_aware'",
        )
        check(0 <= self.momentum < 1, f"optimizer.momentum={self.momentum} must lie in [0, 1)")
        clip = self.clip_grad_norm
        check(clip is None or clip > 0, f"optimizer.clip_grad_norm={clip} must be above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleSection(Config):
    """The learning rate over the run: linear warm-up, then ``kind``."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """``cosine`` to ``final_ratio``; ``wsd``: constant, then linear to ``final_ratio`` over the
    last ``decay_ratio`` of the steps; ``constant``."""
    warmup_ratio: float = 0.1
    """Share of the steps that warm up."""
    final_ratio: float = 0.1
    """Last learning rate as a share of the peak."""
    decay_ratio: float = 0.2
    """Share of the steps that decay, for ``wsd``."""

    def __post_init__(self) -> None:
        for name in ("warmup_ratio", "final_ratio", "decay_ratio"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"schedule.{name}={value} must lie in [0, 1]")
        if self.kind == "wsd":
            total = self.warmup_ratio + self.decay_ratio
            check(total <= 1, f"schedule.warmup_ratio + decay_ratio = {total} must not exceed 1")


@dataclass(frozen=True, kw_only=True)
class BatchSection(Config):
    """How much one optimizer step sees, and how many steps there are."""

    num_sequences: int = 16
    """Sequences of one optimizer step, over all processes."""
    micro_batch: int | None = None
    """Sequences of one forward pass of one process; the rest is accumulated. None: all at once."""
    num_steps: int | None = None
    """Optimizer steps. State this or ``num_tokens``."""
    num_tokens: int | None = None
    """Training tokens; the steps are the whole ones that they give."""

    def __post_init__(self) -> None:
        _at_least_one("batch", self, "num_sequences", "micro_batch", "num_steps", "num_tokens")


@dataclass(frozen=True, kw_only=True)
class EvalSection(Config):
    """Evaluation on the validation split while training."""

    every_steps: int | None = None
    """Steps between evaluations; None: only at the end."""
    num_tokens: int | None = None
    """Tokens of validation text to use, of which the best model is chosen; None: all of it."""
    final_num_tokens: int | None = None
    """After the last step there is one more evaluation, of so many tokens; None: of all."""
    num_sequences: int | None = None
    """Sequences of one forward pass; None: as in training."""

    def __post_init__(self) -> None:
        counts = ("every_steps", "num_tokens", "final_num_tokens", "num_sequences")
        _at_least_one("eval", self, *counts)


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(Config):
    """What a stop can lose, and what is kept."""

    every_steps: int | None = None
    """Steps between checkpoints; None: every ``every_minutes``."""
    every_minutes: float = 10.0
    """Used where ``every_steps`` is None."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        _at_least_one("checkpoint", self, "every_steps")
        minutes = self.every_minutes
        check(minutes >= 0, f"checkpoint.every_minutes={minutes} must be at least 0")
        check(self.keep >= 2, f"checkpoint.keep={self.keep} must be at least 2")


@dataclass(frozen=True, kw_only=True)
class ParallelSection(Config):
    """How the run uses the machine; nothing here changes what is learned."""

    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """``auto``: DDP where ``torchrun`` started several processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; weights stay float32. ``auto``: bf16 where the processor computes in it."""
    compile: bool = False
    """``torch.compile`` each decoder layer."""
    activation_checkpointing: bool | Literal["ffn"] = False
    """Recompute each decoder layer in the backward pass; ``ffn``: only what is inside the FFNs,
    from the rank-R activations of low_rank, which are kept, and the whole products of blocks."""
    num_threads: int | None = None
    """CPU threads of a process; None leaves PyTorch's choice."""
    timeout_seconds: float = 120.0
    """How long a process waits for its peers."""

    def __post_init__(self) -> None:
        _at_least_one("parallel", self, "num_threads")
        seconds = self.timeout_seconds
        check(
            0 < seconds < math.inf,
            f"parallel.timeout_seconds={seconds} must be above 0 and finite",
        )


@dataclass(frozen=True, kw_only=True)
class MonitorSection(Config):
    """What is watched in the structured layers; it changes nothing that is learned."""

    every_steps: int | None = 100
    """Steps between records of norms and of the change of products; None: none. Loss spikes are
    told in any case."""

    def __post_init__(self) -> None:
        _at_least_one("monitor", self, "every_steps")


@dataclass(frozen=True, kw_only=True)
class TrackingSection(Config):
    """Where metrics go besides ``records.jsonl``."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run's folder (needs tensorboard)."""
    wandb_project: str | None = None
    """Log to this W&B project (needs wandb)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A training run. See ``docs/reference/recipes.md`` for a commented example."""

    name: str
    """Names the run's folder, ``runs/<name>``."""
    seed: int = 0
    """Of the weights, the data order and dropout."""
    labels: dict[str, str] = field(default_factory=dict)
    """Words about the run that its records keep. Runs with the same ``family`` belong together in
    reports."""
    model: ModelSection = field(default_factory=ModelSection)
    structure: dict[str, Any] = field(default_factory=dict)
    """``structure``: a registered name, and its fields; or ``param_ratio`` (with ``multiple_of``)
    in place of its free size; ``keep_first_dense`` (true); ``layers``: a map from name or pattern
    to such a target, which replaces the default choice. Empty: a dense model."""
    guide: GuideSection = field(default_factory=GuideSection)
    budget: BudgetSection = field(default_factory=BudgetSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    batch: BatchSection = field(default_factory=BatchSection)
    eval: EvalSection = field(default_factory=EvalSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)

    def __post_init__(self) -> None:
        plain_name = self.name and self.name not in (".", "..")
        check(
            bool(plain_name) and not set(self.name) & set("/\\\0"),
            f"name={self.name!r} must be a plain folder name",
        )
        check(
            self.model.preset is not None or self.model.init_from is not None,
            "model.preset=None: name a preset, or model.init_from",
        )
        # Not in BatchSection, which as a default states neither.
        batch = self.batch
        check(
            (batch.num_steps is None) != (batch.num_tokens is None),
            f"batch.num_steps={batch.num_steps} and batch.num_tokens={batch.num_tokens}: "
            "state exactly one",
        )
        check(self.num_steps >= 1, f"batch.num_tokens={self.batch.num_tokens} is under one step")
        if self.guide.variant == "auto":
            self._choose_guide()
        self._check_guide()

    def _choose_guide(self) -> None:
        """Say ``none`` in the place of ``auto`` where it can mean nothing else; for the rest it
        takes FLOPs, which ``describe`` counts."""
        is_structured = bool(self.structure) and self.structure.get("structure") != "dense"
        if not is_structured or self.model.init_from is not None:
            object.__setattr__(self, "guide", self.guide.replace(variant="none"))

    def with_guide(self) -> TrainConfig:
        """Itself with the guide and, where none is stated, the budget that ``auto`` means."""
        budget = self.budget
        if self.guide.share is None and budget.flops is None:
            budget = BudgetSection(flops="dense", count="executed_flops")
        return self.replace(guide=self.guide.replace(variant="full"), budget=budget)

    def _check_guide(self) -> None:
        guide, flops = self.guide, self.budget.flops
        if guide.variant == "none":
            return
        check(
            bool(self.structure),
            f"guide.variant={guide.variant!r} needs a structure: a dense model has nothing to "
            "guide",
        )
        check(
            (guide.share is None) != (flops is None)
            or (guide.variant == "auto" and guide.share is None),
            f"guide.share={guide.share} and budget.flops={flops}: state exactly one",
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one optimizer step, over all processes."""
        return self.batch.num_sequences * self.data.context_length

    def rows_per_forward(self, num_processes: int = 1) -> int:
        """Sequences of one forward pass of one of ``num_processes``. Raises ``ConfigError`` unless
        they divide the batch."""
        count = self.batch.num_sequences
        check(
            count % num_processes == 0,
            f"batch.num_sequences={count} must be a multiple of the {num_processes} processes",
        )
        local = count // num_processes
        return min(self.batch.micro_batch or local, local)

    @property
    def num_steps(self) -> int:
        """Optimizer steps that ``batch`` states; a ``budget`` may give the run more or fewer."""
        if self.batch.num_steps is not None:
            return self.batch.num_steps
        assert self.batch.num_tokens is not None
        return self.batch.num_tokens // self.tokens_per_step

"""A whole training step of a GPT of the papers: dense beside each structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorlm.accounting import training_flops
from factorlm.bench.cases import (
    Bar,
    BenchmarkCase,
    Timings,
    measure_cases,
    no_bars,
)
from factorlm.bench.model_truth import TrueStep, autocast_loss, structured_layers
from factorlm.bench.options import BenchOptions, unsolved_config
from factorlm.config import Config, check
from factorlm.hf import build_causal_lm
from factorlm.hf.loss import CausalLMLoss
from factorlm.optim import build_optimizer
from factorlm.records import BenchmarkRecord
from factorlm.train.config import ParallelSection
from factorlm.train.parallelize import prepare_layers

HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape(Config):
    """A GPT whose FFNs are four times as wide as it is, the first of them dense."""

    width: int = 768
    num_layers: int = 12
    vocab_size: int = 4096
    context_length: int = 256
    num_key_value_heads: int | None = None
    """None: as many as heads."""

    def __post_init__(self) -> None:
        width, layers = self.width, self.num_layers
        rule = f"must be a multiple of the head size, {HEAD_DIM}"
        check(width >= 1 and width % HEAD_DIM == 0, f"width={width} {rule}")
        check(layers >= 2, f"num_layers={layers} must be at least 2: the first FFN is dense")

    def with_grouped_queries(self) -> ModelShape:
        """The same with half as many key and value heads, at least one."""
        return self.replace(num_key_value_heads=max(1, self.width // HEAD_DIM // 2))

    def build(self, structure: str | None, options: BenchOptions) -> PreTrainedModel:
        """With fresh weights in float32; ``structure`` None is dense."""
        heads = self.width // HEAD_DIM
        return build_causal_lm(
            "gpt_s",
            None if structure is None else unsolved_config(structure),
            param_ratio=None if structure is None else options.share,
            multiple_of=None if structure is None else 16,
            device=options.device,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=self.num_key_value_heads or heads,
            head_dim=HEAD_DIM,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context_length,
        )


def benchmark_model(options: BenchOptions, shape: ModelShape) -> Iterator[BenchmarkRecord]:
    """A record for each number of tokens a step and dtype."""
    for num_tokens in options.num_tokens:
        for dtype in options.dtype_names:
            yield measure_model(options, shape, num_tokens, dtype)


def measure_model(
    options: BenchOptions, shape: ModelShape, num_tokens: int, dtype: str
) -> BenchmarkRecord:
    """Time steps of forward, backward, clipping and fused AdamW; bf16 is autocast's. Raises
    ``NumericError`` if a model computes something else (``checked_models``)."""
    device = torch.device(options.device)
    rows = max(1, num_tokens // shape.context_length)
    models = checked_models(options, shape, rows, dtype)
    flops = {
        name: training_flops(
            model, num_tokens=rows * shape.context_length, seq_len=shape.context_length
        ).model_flops
        for name, model in models.items()
    }
    cases = {
        name: BenchmarkCase(
            run=training_step(model, rows, shape, dtype),
            ideal_speedup=None if model is models["dense"] else flops["dense"] / flops[name],
        )
        for name, model in models.items()
    }
    settings = asdict(shape) | {
        "num_tokens": rows * shape.context_length,
        "dtype": dtype,
        "share": options.share,
        "structures": structures_of(models),
    }
    return measure_cases(
        "model",
        settings,
        cases,
        device=device,
        rounds=options.rounds,
        min_round_ms=1.0,
        bars=partial(model_bars, flops) if device.type == "cpu" and shape.width >= 768 else no_bars,
    )


def checked_models(
    options: BenchOptions, shape: ModelShape, rows: int, dtype: str
) -> dict[str, PreTrainedModel]:
    """Dense and each structure, then the compiled ones, by label, all of them right in the step
    that is timed: its tokens, its form and its dtype; and plain ones also in float32."""
    plain, compiled = {}, {}
    for name in ("dense", *options.structures):
        model = shape.build(None if name == "dense" else name, options)
        truth = TrueStep(model, random_ids(model, rows, shape))
        if dtype != "fp32":
            truth.check_alone(name, model)
        truth.check(name, model, dtype)
        plain[name] = model
        if options.compiled:
            label = f"{name}, compiled"
            compiled[label] = compiled_copy(model)
            truth.check(label, compiled[label], dtype)
    return plain | compiled


def compiled_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same with its decoder layers compiled, as a recipe's ``parallel.compile`` has it."""
    copied = copy.deepcopy(model)
    prepare_layers(copied, ParallelSection(compile=True))
    return copied


def structures_of(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Model -> the config of its first structured layer, as records hold it; dense ones have none.

    The layers on the way back from the FFN's width may have another rank.
    """
    first = {
        name: next(iter(structured_layers(model).values()), None) for name, model in models.items()
    }
    return {name: layer.config.to_target() for name, layer in first.items() if layer is not None}


def model_bars(flops: Mapping[str, float], times: Timings) -> list[Bar]:
    """low_rank against what the FLOPs of the whole step allow, compiled by compiled."""
    bars = []
    for ending in ("", ", compiled"):
        dense, low_rank = f"dense{ending}", f"low_rank{ending}"
        if low_rank in times:
            value = times.ratio(dense, low_rank) * flops[low_rank] / flops[dense]
            name = f"dense / low_rank{ending}, by the step's FLOP ratio"
            bars.append(Bar(name=name, value=value, limit=0.9, at_most=False))
    return bars


def training_step(
    model: PreTrainedModel, rows: int, shape: ModelShape, dtype: str
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW on random tokens; bf16 is autocast's."""
    model.train()
    loss_of = CausalLMLoss(model)
    optimizer = build_optimizer(model, learning_rate=1e-4)
    ids = random_ids(model, rows, shape)

    def run() -> None:
        loss = autocast_loss(loss_of, ids[:, :-1], ids[:, 1:], dtype)
        (loss / ids[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def random_ids(model: PreTrainedModel, rows: int, shape: ModelShape) -> Tensor:
    """The tokens of a step, (rows, context_length + 1), where ``model`` is."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, shape.context_length + 1)
    return torch.randint(shape.vocab_size, size, generator=generator).to(model.device)

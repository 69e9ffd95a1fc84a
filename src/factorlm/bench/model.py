"""A whole training step of a GPT of the papers: dense beside each structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from factorlm.accounting import training_flops
from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.options import DTYPES, BenchOptions
from factorlm.config import Config, check
from factorlm.hf import build_causal_lm
from factorlm.hf.loss import CausalLMLoss
from factorlm.layers import STRUCTURES
from factorlm.optim import build_optimizer
from factorlm.records import BenchmarkRecord

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
            None if structure is None else STRUCTURES[structure](),
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
    """Time steps of forward, backward, clipping and fused AdamW; bf16 is autocast's."""
    device = torch.device(options.device)
    rows = max(1, num_tokens // shape.context_length)
    names = {"dense": None} | {name: name for name in options.structures}
    models = {name: shape.build(kind, options) for name, kind in names.items()}
    flops = {
        name: training_flops(
            model, num_tokens=rows * shape.context_length, seq_len=shape.context_length
        ).model_flops
        for name, model in models.items()
    }
    cases = {
        name: BenchmarkCase(
            run=training_step(model, rows, shape, dtype),
            ideal_speedup=None if name == "dense" else flops["dense"] / flops[name],
        )
        for name, model in models.items()
    }
    settings = asdict(shape) | {
        "num_tokens": rows * shape.context_length,
        "dtype": dtype,
        "share": options.share,
    }
    return measure_cases(
        "model",
        settings,
        cases,
        device=device,
        rounds=options.rounds,
        min_round_ms=1.0,
        bars=partial(model_bars, flops) if shape.width >= 768 else no_bars,
    )


def model_bars(flops: Mapping[str, float], times: Timings) -> list[Bar]:
    """low_rank against what the FLOPs of the whole step allow."""
    if "low_rank" not in times:
        return []
    name = "dense / low_rank, by the step's FLOP ratio"
    value = times.ratio("dense", "low_rank") * flops["low_rank"] / flops["dense"]
    return [Bar(name=name, value=value, limit=0.9, at_most=False)]


def training_step(
    model: PreTrainedModel, rows: int, shape: ModelShape, dtype: str
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW on random tokens; bf16 is autocast's."""
    model.train()
    loss_of = CausalLMLoss(model)
    optimizer = build_optimizer(model, learning_rate=1e-4)
    generator = torch.Generator().manual_seed(0)
    size = (rows, shape.context_length + 1)
    ids = torch.randint(shape.vocab_size, size, generator=generator).to(model.device)
    kind = model.device.type

    def run() -> None:
        with torch.autocast(kind, dtype=DTYPES[dtype], enabled=dtype != "fp32"):
            loss = loss_of(ids[:, :-1], ids[:, 1:])
        (loss / ids[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run

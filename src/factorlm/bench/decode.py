"""Greedy generation: dense and each structure with our decoder, and with Hugging Face's.

On a CPU our weights are packed, and a second case has the step of a token compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.model import ModelShape
from factorlm.bench.options import DTYPES, BenchOptions
from factorlm.config import Config, check
from factorlm.errors import NumericError
from factorlm.inference import Decoder, Sampling, pack_
from factorlm.records import BenchmarkRecord

GREEDY = Sampling(greedy=True)
NUM_CHECKED = 8
"""Tokens that are compared with Hugging Face's before anything is timed."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Config):
    """What is generated."""

    batch_sizes: tuple[int, ...] = (1, 8)
    num_prompt_tokens: int = 8
    num_new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "num_new_tokens"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be at least 1")
        smallest = min(self.batch_sizes, default=0)
        check(smallest >= 1, f"batch_sizes={self.batch_sizes} must be at least 1")


def benchmark_decode(
    options: BenchOptions, shape: ModelShape, decode: DecodeOptions
) -> Iterator[BenchmarkRecord]:
    """A record for each dtype and batch size."""
    names = ("dense", *options.structures)
    models = {name: build(name, options, shape, decode) for name in names}
    for dtype in options.dtype_names:
        for model in models.values():
            model.to(DTYPES[dtype])
        for batch_size in decode.batch_sizes:
            yield measure_decode(options, shape, decode, models, dtype, batch_size)


def build(
    name: str, options: BenchOptions, shape: ModelShape, decode: DecodeOptions
) -> PreTrainedModel:
    """In eval mode, its tokens compared with Hugging Face's in float32 (``NumericError``)."""
    model = shape.build(None if name == "dense" else name, options).eval()
    few = decode.replace(num_new_tokens=min(NUM_CHECKED, decode.num_new_tokens))
    ours, theirs = ours_of(model, 1, few)(), huggingface_of(model, 1, few)()
    packed = ours_of(packed_copy(model), 1, few)()
    if not torch.equal(ours, theirs) or not torch.equal(packed, theirs):
        raise NumericError(f"{name}: the decoder's tokens differ from those of generate")
    return model


def packed_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with packed weights; on an accelerator ``model``."""
    if model.device.type != "cpu":
        return model
    packed = copy.deepcopy(model)
    pack_(packed)
    return packed


def measure_decode(
    options: BenchOptions,
    shape: ModelShape,
    decode: DecodeOptions,
    models: Mapping[str, PreTrainedModel],
    dtype: str,
    batch_size: int,
) -> BenchmarkRecord:
    """Time whole generations, the prompt included."""
    num_bytes = {name: weight_bytes(model) for name, model in models.items()}
    num_tokens = batch_size * decode.num_new_tokens
    cases = {}
    for name, model in models.items():
        ideal = None if name == "dense" else num_bytes["dense"] / num_bytes[name]
        runs = {
            name: ours_of(packed_copy(model), batch_size, decode),
            f"{name}, HF": huggingface_of(model, batch_size, decode),
        }
        if options.device == "cpu":
            runs[f"{name}, compiled"] = ours_of(model, batch_size, decode, compiled=True)
        for label, run in runs.items():
            cases[label] = BenchmarkCase(run=run, ideal_speedup=ideal, num_tokens=num_tokens)
    settings = {"batch_size": batch_size} | generation_settings(options, shape, decode, dtype)
    bars = partial(decode_bars, num_bytes, batch_size) if shape.width >= 1024 else no_bars
    return measure_cases(
        "decode",
        settings,
        cases,
        device=torch.device(options.device),
        rounds=options.rounds,
        min_round_ms=1.0,
        bars=bars,
    )


def generation_settings(
    options: BenchOptions, shape: ModelShape, decode: DecodeOptions, dtype: str
) -> dict[str, Any]:
    """What records of generation say of their models and of what is generated."""
    return asdict(shape) | {
        "num_prompt_tokens": decode.num_prompt_tokens,
        "num_new_tokens": decode.num_new_tokens,
        "dtype": dtype,
        "share": options.share,
    }


def decode_bars(num_bytes: Mapping[str, int], batch_size: int, times: Timings) -> list[Bar]:
    """low_rank against the bytes that one token has to read, and against Hugging Face."""
    if "low_rank" not in times:
        return []
    bars = []
    byte_ratio = num_bytes["dense"] / num_bytes["low_rank"]
    for ending in ("", ", compiled"):
        ours, dense = f"low_rank{ending}", f"dense{ending}"
        if ours not in times:
            continue
        value = times.ratio("low_rank, HF", ours)
        name = f"low_rank with generate of Hugging Face / with ours{ending}"
        bars.append(Bar(name=name, value=value, limit=1.25, at_most=False))
        if batch_size == 1:
            value = times.ratio(dense, ours) / byte_ratio
            name = f"dense / low_rank{ending}, by the ratio of their bytes"
            bars.append(Bar(name=name, value=value, limit=0.85, at_most=False))
    return bars


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a token reads: all but the rows of an untied embedding."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    left_out = 0 if embedding is head else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - left_out


def ours_of(
    model: PreTrainedModel, batch_size: int, decode: DecodeOptions, *, compiled: bool = False
) -> Callable[[], torch.Tensor]:
    """Greedy generation with ``Decoder``; new ids (B, num_new_tokens).

    A ``Decoder`` changes how its model attends, so it gets one of its own, over the same weights.
    """
    decoder = Decoder(_sharing(model), compiled=compiled)
    prompts = _prompts(model, batch_size, decode).tolist()
    count = decode.num_new_tokens
    return lambda: decoder.generate(prompts, max_new_tokens=count, sampling=GREEDY).ids


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with its parameters and buffers."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def huggingface_of(
    model: PreTrainedModel, batch_size: int, decode: DecodeOptions
) -> Callable[[], torch.Tensor]:
    """The same with the model's own ``generate``, as its users call it."""
    ids = _prompts(model, batch_size, decode).to(model.device)
    mask, count = torch.ones_like(ids), decode.num_new_tokens

    @torch.no_grad()
    def run() -> torch.Tensor:
        whole = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
        )
        return whole[:, ids.shape[1] :].cpu()

    return run


def _prompts(model: PreTrainedModel, batch_size: int, decode: DecodeOptions) -> torch.Tensor:
    size = (batch_size, decode.num_prompt_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, size, generator=generator)

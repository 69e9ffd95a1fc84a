"""Greedy generation: dense and each structure with our decoder, and with Hugging Face's.

On a CPU our weights are packed, a second case has the step of a token compiled, and a third has
Hugging Face's ``generate`` over packed weights: what is packing, and what is the loop.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorlm.bench.cases import (
    Bar,
    BenchmarkCase,
    Timings,
    measure_cases,
    no_bars,
    record_of,
    require_close,
)
from factorlm.bench.model import ModelShape, structures_of
from factorlm.bench.model_truth import dense_twin
from factorlm.bench.options import DTYPES, BenchOptions
from factorlm.config import Config, check
from factorlm.errors import NumericError
from factorlm.inference import Decoder, Sampling, pack_
from factorlm.measure import Measurement
from factorlm.records import BenchmarkRecord

GREEDY = Sampling(greedy=True)
NUM_CHECKED = 8
"""Tokens that are compared before anything is timed."""
LOGIT_TOLERANCES = {"fp32": 1e-3, "bf16": 0.04, "fp16": 0.04}
"""Largest difference of a logit on the same prefix, by the largest logit, from a dense copy in
float32: twice what two computations of one model in bf16 may differ by (docs/how-to/generate.md).
"""
WHOLE, STEPS = "whole generation", "steps alone"


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

    @property
    def num_checked(self) -> int:
        """New tokens that are compared before anything is timed."""
        return min(NUM_CHECKED, self.num_new_tokens)


class DecoderRun:
    """Greedy generation with ``Decoder``, to be called; new ids (B, num_new_tokens).

    A ``Decoder`` changes how its model attends, so it gets one of its own, over the same weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        decode: DecodeOptions,
        *,
        compiled: bool = False,
    ) -> None:
        self._decoder = Decoder(sharing_copy(model), compiled=compiled)
        self._ids, self._decode = forced_ids(model, batch_size, decode), decode
        self._prompts = self._ids[:, : decode.num_prompt_tokens].tolist()
        self.step_ms: list[float] = []
        """The median step of each call."""

    def __call__(self) -> Tensor:
        found = self._decoder.generate(
            self._prompts, max_new_tokens=self._decode.num_new_tokens, sampling=GREEDY
        )
        if found.decode_ms:
            self.step_ms.append(statistics.median(found.decode_ms))
        return found.ids

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, num_checked, V), by the steps that are timed, with the tokens forced."""
        start = self._decode.num_prompt_tokens
        # The very steps that ``generate`` takes: others would have to be compiled anew.
        steps = self._decoder._steps(len(self._ids), start + self._decode.num_new_tokens)
        found = [steps.prefill(self._ids[:, :start], None).clone()]
        for place in range(start, self._ids.shape[1]):
            found.append(steps.step(self._ids[:, place]).clone())
        return torch.stack(found, dim=1)


class HuggingFaceRun:
    """The same with the model's own ``generate``, as its users call it."""

    def __init__(self, model: PreTrainedModel, batch_size: int, decode: DecodeOptions) -> None:
        self._model, self._decode = model, decode
        self._ids = forced_ids(model, batch_size, decode)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        ids = self._ids[:, : self._decode.num_prompt_tokens]
        whole = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self._decode.num_new_tokens,
            pad_token_id=0,
        )
        return whole[:, ids.shape[1] :].cpu()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, num_checked, V) of one forward with the tokens forced."""
        logits: Tensor = self._model(input_ids=self._ids, use_cache=False).logits
        return logits[:, self._decode.num_prompt_tokens - 1 :]


Run = DecoderRun | HuggingFaceRun


def benchmark_decode(
    options: BenchOptions, shape: ModelShape, decode: DecodeOptions
) -> Iterator[BenchmarkRecord]:
    """Two records for each dtype and batch size: whole generations, and steps alone."""
    names = ("dense", *options.structures)
    models = {name: build(name, options, shape, decode) for name in names}
    for dtype in options.dtype_names:
        for model in models.values():
            model.to(DTYPES[dtype])
        for batch_size in decode.batch_sizes:
            yield from measure_decode(options, shape, decode, models, dtype, batch_size)


def build(
    name: str, options: BenchOptions, shape: ModelShape, decode: DecodeOptions
) -> PreTrainedModel:
    """In eval mode, its tokens compared with Hugging Face's in float32 (``NumericError``)."""
    model = shape.build(None if name == "dense" else name, options).eval()
    few = decode.replace(num_new_tokens=decode.num_checked)
    check_tokens(name, DecoderRun(model, 1, few)(), model, few)
    check_tokens(f"{name}, packed", DecoderRun(packed_copy(model), 1, few)(), model, few)
    return model


def check_tokens(label: str, found: Tensor, model: PreTrainedModel, decode: DecodeOptions) -> None:
    """The first of the new tokens ``found`` (B, N) are those of the ``generate`` of ``model``."""
    few = decode.replace(num_new_tokens=decode.num_checked)
    wanted = HuggingFaceRun(model, len(found), few)()
    if not torch.equal(found[:, : decode.num_checked], wanted):
        raise NumericError(f"{label}: the tokens differ from those of generate")


def check_logits(label: str, run: Run, wanted: Tensor, dtype: str) -> None:
    """Those of ``run`` are ``wanted`` (B, num_checked, V) within the dtype's tolerance."""
    error = float((run.logits().float() - wanted).abs().max() / wanted.abs().max())
    require_close(f"{label}: logits in {dtype}", error, LOGIT_TOLERANCES[dtype])


def packed_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with packed weights beside its own; on an accelerator ``model``."""
    if model.device.type != "cpu":
        return model
    packed = sharing_copy(model)
    pack_(packed)
    return packed


def measure_decode(
    options: BenchOptions,
    shape: ModelShape,
    decode: DecodeOptions,
    models: Mapping[str, PreTrainedModel],
    dtype: str,
    batch_size: int,
) -> Iterator[BenchmarkRecord]:
    """Time whole generations, the prompt included; then, of the same runs, the steps alone."""
    num_bytes = {name: weight_bytes(model) for name, model in models.items()}
    runs: dict[str, Run] = {}
    cases = {}
    for name, model in models.items():
        ideal = None if name == "dense" else num_bytes["dense"] / num_bytes[name]
        for label, run in checked_runs(name, model, batch_size, decode, dtype).items():
            runs[label] = run
            cases[label] = BenchmarkCase(
                run=run, ideal_speedup=ideal, num_tokens=batch_size * decode.num_new_tokens
            )
    settings = {"batch_size": batch_size} | generation_settings(
        options, shape, decode, dtype, models
    )
    device = torch.device(options.device)
    bars = partial(decode_bars, num_bytes, batch_size, device.type == "cpu")
    promised = shape.width >= 1024
    yield measure_cases(
        "decode",
        {"timed": WHOLE} | settings,
        cases,
        device=device,
        rounds=options.rounds,
        min_round_ms=0.0,  # one generation a round, so that its steps are the round's
        bars=partial(bars, WHOLE) if promised else no_bars,
    )
    steps = step_measurements(runs, options.rounds)
    if steps:
        yield record_of(
            "decode",
            {"timed": STEPS} | settings,
            {label: replace(cases[label], num_tokens=batch_size) for label in steps},
            steps,
            device=device,
            bars=partial(bars, STEPS) if promised else no_bars,
        )


def checked_runs(
    name: str, model: PreTrainedModel, batch_size: int, decode: DecodeOptions, dtype: str
) -> dict[str, Run]:
    """Every way to generate with ``model``, by label: its logits are those of the dense twin, and
    in float32 its first tokens those of ``generate``. Raises ``NumericError``."""
    packed = packed_copy(model)
    runs: dict[str, Run] = {
        name: DecoderRun(packed, batch_size, decode),
        f"{name}, HF": HuggingFaceRun(model, batch_size, decode),
    }
    if model.device.type == "cpu":
        runs[f"{name}, packed, HF"] = HuggingFaceRun(packed, batch_size, decode)
        runs[f"{name}, compiled"] = DecoderRun(model, batch_size, decode, compiled=True)
    check_runs(runs, model, batch_size, decode, dtype)
    return runs


def check_runs(
    runs: Mapping[str, Run],
    model: PreTrainedModel,
    batch_size: int,
    decode: DecodeOptions,
    dtype: str,
) -> None:
    """See ``checked_runs``."""
    wanted = HuggingFaceRun(dense_twin(model), batch_size, decode).logits()
    for label, run in runs.items():
        check_logits(label, run, wanted, dtype)
        if dtype == "fp32" and isinstance(run, DecoderRun):
            check_tokens(label, run(), model, decode)


def step_measurements(runs: Mapping[str, Run], rounds: int) -> dict[str, Measurement]:
    """The median step of each of the last ``rounds`` calls; none of Hugging Face's, and none
    where one token is all that is generated."""
    return {
        label: Measurement(latencies_ms=tuple(run.step_ms[-rounds:]), calls_per_round=1)
        for label, run in runs.items()
        if isinstance(run, DecoderRun) and run.step_ms
    }


def generation_settings(
    options: BenchOptions,
    shape: ModelShape,
    decode: DecodeOptions,
    dtype: str,
    models: Mapping[str, PreTrainedModel],
) -> dict[str, Any]:
    """What records of generation say of their models and of what is generated."""
    return asdict(shape) | {
        "num_prompt_tokens": decode.num_prompt_tokens,
        "num_new_tokens": decode.num_new_tokens,
        "dtype": dtype,
        "share": options.share,
        "structures": structures_of(models),
    }


def decode_bars(
    num_bytes: Mapping[str, int], batch_size: int, on_cpu: bool, timed: str, times: Timings
) -> list[Bar]:
    """low_rank against the bytes that one token has to read, on a CPU, where they decide, and
    against Hugging Face, which only whole generations are; ``timed`` says which these are."""
    bars = []
    for ending in ("", ", compiled"):
        ours, dense = f"low_rank{ending}", f"dense{ending}"
        if ours not in times:
            continue
        if "low_rank, HF" in times:
            value = times.ratio("low_rank, HF", ours)
            name = f"low_rank with generate of Hugging Face / with ours{ending}, {timed}"
            bars.append(Bar(name=name, value=value, limit=1.25, at_most=False))
        if batch_size == 1 and on_cpu:
            value = times.ratio(dense, ours) * num_bytes["low_rank"] / num_bytes["dense"]
            name = f"dense / low_rank{ending}, by the ratio of their bytes, {timed}"
            bars.append(Bar(name=name, value=value, limit=0.85, at_most=False))
    return bars


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a token reads: all but the rows of an untied embedding."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    left_out = 0 if embedding is head else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - left_out


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with its parameters and buffers."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def forced_ids(model: PreTrainedModel, batch_size: int, decode: DecodeOptions) -> Tensor:
    """Random ids: prompts, and the tokens that come after them where logits are compared,
    (B, num_prompt_tokens + num_checked - 1)."""
    size = (batch_size, decode.num_prompt_tokens + decode.num_checked - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, size, generator=generator)
    return ids.to(model.device)

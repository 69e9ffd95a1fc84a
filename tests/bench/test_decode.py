"""Greedy generation: what is timed is right, and what is promised of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.bench.test_linear import timings
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from factorlm.bench import BenchOptions, decode
from factorlm.bench.decode import (
    STEPS,
    WHOLE,
    DecodeOptions,
    DecoderRun,
    HuggingFaceRun,
    benchmark_decode,
    build,
    checked_runs,
    decode_bars,
    packed_copy,
    step_measurements,
    weight_bytes,
)
from factorlm.bench.model import ModelShape
from factorlm.errors import ConfigError, NumericError
from factorlm.inference import Decoder, packing
from factorlm.layers import PreMergedLinear

OPTIONS = BenchOptions(dtypes=("fp32",), rounds=2, structures=("low_rank",))
SHAPE = ModelShape(width=128, num_layers=2, vocab_size=64, context_length=32)
SHORT = DecodeOptions(batch_sizes=(1, 2), num_prompt_tokens=3, num_new_tokens=4)


@pytest.fixture
def model() -> PreTrainedModel:
    return build("low_rank", OPTIONS, SHAPE, SHORT)


@pytest.fixture
def packs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of so small a model too."""
    monkeypatch.setattr(packing, "MIN_BYTES", {torch.float32: 0, torch.bfloat16: 0})


def test_both_generate_the_same_tokens_and_logits(model: PreTrainedModel) -> None:
    ours, theirs = DecoderRun(model, 2, SHORT), HuggingFaceRun(model, 2, SHORT)
    assert ours().shape == (2, 4)
    assert torch.equal(ours(), theirs())
    assert ours.logits().shape == (2, 4, 64)
    torch.testing.assert_close(ours.logits(), theirs.logits(), rtol=1e-4, atol=1e-5)


def test_a_decoder_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Decoder.generate

    def wrong(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        found = generate(self, *args, **kwargs)
        return SimpleNamespace(ids=found.ids + 1, decode_ms=found.decode_ms)

    monkeypatch.setattr(decode.Decoder, "generate", wrong)
    with pytest.raises(NumericError, match="dense: the tokens differ"):
        list(benchmark_decode(OPTIONS, SHAPE, SHORT))


@pytest.mark.usefixtures("packs_all")
def test_wrong_packed_weights_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight.to_dense() if weight.is_mkldnn else weight, bias) * 1.5

    monkeypatch.setattr("factorlm.layers.premerged.linear_packed", wrong)
    with pytest.raises(NumericError, match="low_rank: logits in fp32"):
        checked_runs("low_rank", model, 2, SHORT, "fp32")


def test_a_wrong_compiled_step_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    monkeypatch.setattr(
        "factorlm.inference.graph.compile_frozen", lambda steps: lambda: 1.01 * steps._step()
    )
    with pytest.raises(NumericError, match=r"low_rank, compiled: logits in fp32 is off by 0\.01"):
        checked_runs("low_rank", model, 1, SHORT, "fp32")


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_step_that_is_wrong_in_bfloat16_alone_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, batch_size: int
) -> None:
    """As the products of ``attend`` could be, which float32 does not take."""
    from factorlm.inference import attention

    attend_one = attention.attend_one
    monkeypatch.setattr(attention, "FEWEST_PRODUCTS", 1)
    monkeypatch.setattr(attention, "attend_one", lambda *args: attend_one(*args) + 1)
    with pytest.raises(NumericError, match="low_rank: logits in bf16"):
        checked_runs("low_rank", model.bfloat16(), batch_size, SHORT, "bf16")


def test_a_wrong_structured_layer_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """Ours and Hugging Face's loop would agree on it: the truth multiplies by ``to_dense``."""

    def wrong(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(linear(x, V), U, bias) * 1.5

    monkeypatch.setattr("factorlm.layers.low_rank.low_rank", wrong)
    with pytest.raises(NumericError, match="low_rank: logits"):
        checked_runs("low_rank", model, 1, SHORT, "fp32")


def test_a_packed_copy_shares_the_weights_and_packs_for_hugging_face_too(
    monkeypatch: pytest.MonkeyPatch, packs_all: None, model: PreTrainedModel
) -> None:
    packed = packed_copy(model)
    pairs = zip(model.parameters(), packed.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    HuggingFaceRun(packed, 1, SHORT)()
    layers = [module for module in packed.modules() if isinstance(module, PreMergedLinear)]
    assert len(layers) == 2
    assert all(layer._packed.exists for layer in layers)


def test_records_of_each_batch_size_whole_and_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled step runs as it is; ``test_every_benchmark_runs`` compiles it."""
    monkeypatch.setattr("factorlm.inference.graph.compile_frozen", lambda steps: steps._step)
    records = list(benchmark_decode(OPTIONS, SHAPE, SHORT))
    assert [(record.settings["timed"], record.settings["batch_size"]) for record in records] == [
        (WHOLE, 1), (STEPS, 1), (WHOLE, 2), (STEPS, 2),
    ]  # fmt: skip
    whole, steps = records[:2]
    ways = ("", ", HF", ", packed, HF", ", compiled")
    assert set(whole.cases) == {f"{name}{way}" for name in ("dense", "low_rank") for way in ways}
    assert set(steps.cases) == {
        f"{name}{way}" for name in ("dense", "low_rank") for way in ways[::3]
    }
    assert [record.cases["dense"]["num_tokens"] for record in records] == [4, 1, 8, 2]
    assert [record.rounds for record in records] == [2] * 4
    assert steps.cases["dense"]["median_ms"] < whole.cases["dense"]["median_ms"]
    assert whole.settings["structures"]["low_rank"]["structure"] == "low_rank"
    model, dense = (SHAPE.build(name, OPTIONS) for name in ("low_rank", None))
    expected = weight_bytes(dense) / weight_bytes(model)
    assert whole.cases["low_rank"]["ideal_speedup"] == expected > 1
    assert steps.cases["low_rank"]["ideal_speedup"] == expected


def test_steps_are_those_of_the_rounds(model: PreTrainedModel) -> None:
    """What came before the rounds, checks and warm-ups, does not count."""
    run = DecoderRun(model, 1, SHORT)
    run()
    assert len(run.step_ms) == 1
    run.step_ms = [9.0, 8.0, 1.0, 2.0]
    found = step_measurements({"ours": run, "theirs": HuggingFaceRun(model, 1, SHORT)}, 2)
    assert {name: times.latencies_ms for name, times in found.items()} == {"ours": (1.0, 2.0)}
    one = DecoderRun(model, 1, SHORT.replace(num_new_tokens=1))
    one()
    assert step_measurements({"ours": one}, 2) == {}


def test_bytes_of_a_token_leave_out_an_untied_embedding() -> None:
    model = SHAPE.build(None, OPTIONS)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert weight_bytes(model) == 4 * count
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(64, 128))
    assert weight_bytes(model) == 4 * count


def test_bars_of_decoding_say_what_they_are_of() -> None:
    num_bytes = {"dense": 160, "low_rank": 100}
    times = timings({"dense": 3.0, "low_rank": 2.0, "low_rank, HF": 3.0})
    bars = decode_bars(num_bytes, 1, True, WHOLE, times)
    assert [(bar.value, bar.limit, bar.at_most) for bar in bars] == [
        (1.5, 1.25, False),
        (pytest.approx(1.5 / 1.6), 0.85, False),
    ]
    assert all(bar.name.endswith(", whole generation") for bar in bars)
    assert len(decode_bars(num_bytes, 8, True, WHOLE, times)) == 1
    assert len(decode_bars(num_bytes, 1, False, WHOLE, times)) == 1  # on a GPU
    steps = timings(
        {"dense": 3.0, "low_rank": 2.5, "dense, compiled": 4.0, "low_rank, compiled": 2.5}
    )
    plain, compiled = decode_bars(num_bytes, 1, True, STEPS, steps)
    assert (plain.name, plain.value) == (
        "dense / low_rank, by the ratio of their bytes, steps alone", pytest.approx(0.75)
    )  # fmt: skip
    assert compiled.value == 1.0
    assert decode_bars(num_bytes, 1, True, WHOLE, timings({"dense": 3.0})) == []


def test_wrong_options_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="num_new_tokens=0 must be at least 1"):
        DecodeOptions(num_new_tokens=0)
    with pytest.raises(ConfigError, match="batch_sizes"):
        DecodeOptions(batch_sizes=())

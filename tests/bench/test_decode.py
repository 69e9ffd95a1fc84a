"""Greedy generation and the best batch size."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.bench.test_linear import timings

from factorlm.bench import BenchOptions, decode, throughput
from factorlm.bench.decode import (
    DecodeOptions,
    benchmark_decode,
    build,
    decode_bars,
    huggingface_of,
    ours_of,
    weight_bytes,
)
from factorlm.bench.model import ModelShape
from factorlm.bench.throughput import benchmark_throughput, best_batch_size, cache_bytes
from factorlm.errors import ConfigError, NumericError
from factorlm.inference import Decoder

OPTIONS = BenchOptions(dtypes=("fp32",), rounds=2, structures=("low_rank",))
SHAPE = ModelShape(width=128, num_layers=2, vocab_size=64, context_length=32)
SHORT = DecodeOptions(batch_sizes=(1, 2), num_prompt_tokens=3, num_new_tokens=4)


def test_both_generate_the_same_tokens() -> None:
    model = build("low_rank", OPTIONS, SHAPE, SHORT)
    ours, theirs = ours_of(model, 2, SHORT)(), huggingface_of(model, 2, SHORT)()
    assert ours.shape == (2, 4)
    assert torch.equal(ours, theirs)


def test_a_decoder_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Decoder.generate

    def wrong(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        found = generate(self, *args, **kwargs)
        return SimpleNamespace(ids=found.ids + 1)

    monkeypatch.setattr(decode.Decoder, "generate", wrong)
    with pytest.raises(NumericError, match="dense: the decoder's tokens differ"):
        list(benchmark_decode(OPTIONS, SHAPE, SHORT))


def test_records_of_each_batch_size() -> None:
    one, two = benchmark_decode(OPTIONS, SHAPE, SHORT)
    ways = ("", ", HF", ", compiled")
    assert set(one.cases) == {f"{name}{way}" for name in ("dense", "low_rank") for way in ways}
    assert [r.cases["dense"]["num_tokens"] for r in (one, two)] == [4, 8]
    model, dense = (SHAPE.build(name, OPTIONS) for name in ("low_rank", None))
    expected = weight_bytes(dense) / weight_bytes(model)
    assert one.cases["low_rank"]["ideal_speedup"] == expected > 1


def test_bytes_of_a_token_leave_out_an_untied_embedding() -> None:
    model = SHAPE.build(None, OPTIONS)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert weight_bytes(model) == 4 * count
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(64, 128))
    assert weight_bytes(model) == 4 * count


def test_bars_of_decoding() -> None:
    times = timings({"dense": 3.0, "low_rank": 2.0, "low_rank, HF": 3.0})
    bars = decode_bars({"dense": 160, "low_rank": 100}, 1, times)
    assert [(bar.value, bar.limit, bar.at_most) for bar in bars] == [
        (1.5, 1.25, False),
        (pytest.approx(1.5 / 1.6), 0.85, False),
    ]
    assert len(decode_bars({"dense": 160, "low_rank": 100}, 8, times)) == 1


def test_the_batch_doubles_while_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes as long up to 4 rows; 8 rows take twice as long."""
    model = SHAPE.build(None, OPTIONS)
    now = 0.0

    def ours(model: object, batch: int, options: DecodeOptions) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += max(1.0, batch / 4)

        return run

    monkeypatch.setattr(throughput, "ours_of", ours)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    assert best_batch_size(model, SHORT) == 4
    row = cache_bytes(model, SHORT)
    assert row == 2 * 2 * 2 * 64 * 7 * 4  # k and v, layers, heads, head size, tokens, bytes
    monkeypatch.setattr(throughput, "free_memory_bytes", lambda device: 2.5 * row / 0.7)
    assert best_batch_size(model, SHORT) == 2


def test_throughput_has_every_model_with_and_without_grouped_queries() -> None:
    (record,) = benchmark_throughput(OPTIONS, SHAPE, SHORT)
    names = [name.split(",")[0] for name in record.cases]
    assert names == ["dense", "low_rank", "dense GQA", "low_rank GQA"]
    assert SHAPE.with_grouped_queries().build(None, OPTIONS).config.num_key_value_heads == 1


def test_wrong_options_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="num_new_tokens=0 must be at least 1"):
        DecodeOptions(num_new_tokens=0)
    with pytest.raises(ConfigError, match="batch_sizes"):
        DecodeOptions(batch_sizes=())

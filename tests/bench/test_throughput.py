"""The best batch size, and each model there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.bench.test_decode import OPTIONS, SHAPE, SHORT
from transformers import PreTrainedModel

from factorlm.bench import throughput
from factorlm.bench.decode import DecodeOptions, weight_bytes
from factorlm.bench.throughput import (
    benchmark_throughput,
    best_batch_size,
    cache_bytes,
    token_bytes,
)
from factorlm.errors import NumericError

ALL = 1e12
"""Bytes for any batch."""
FEW_ROWS = 10**6
"""Bytes whose share is enough for a few rows."""


@pytest.fixture
def model() -> PreTrainedModel:
    return SHAPE.build(None, OPTIONS)


def takes(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float]) -> list[int]:
    """As if a generation took ``seconds(rows, call)``; returns the sizes that were tried."""
    now, tried = 0.0, []

    def decoder_run(model: object, batch: int, options: DecodeOptions) -> Callable[[], None]:
        calls = iter(range(100))
        tried.append(batch)

        def run() -> None:
            nonlocal now
            now += seconds(batch, next(calls))

        return run

    monkeypatch.setattr(throughput, "DecoderRun", decoder_run)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    return tried


def test_the_batch_doubles_until_two_sizes_gain_nothing(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """A step takes as long up to 4 rows, then in proportion."""
    tried = takes(monkeypatch, lambda batch, call: max(1.0, batch / 4))
    lines: list[str] = []
    assert best_batch_size(model, SHORT, ALL, lines.append) == 4
    assert tried == [1, 2, 4, 8, 16]
    rates = [min(size, 4) * SHORT.num_new_tokens for size in tried]
    said = [f"batch {size}: {rate} tokens/s" for size, rate in zip(tried, rates, strict=True)]
    assert lines == said


def test_one_size_without_gain_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    seconds = {1: 1.0, 2: 2.0, 4: 2.0, 8: 4.0, 16: 8.0}
    takes(monkeypatch, lambda batch, call: seconds[batch])
    assert best_batch_size(model, SHORT, ALL) == 4


def test_one_slow_generation_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    slow = {(8, 1): 100.0, (2, 3): 100.0}
    takes(monkeypatch, lambda batch, call: slow.get((batch, call), max(1.0, batch / 8)))
    assert best_batch_size(model, SHORT, ALL) == 8


def test_memory_ends_the_search(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    row = cache_bytes(model, 7)
    assert row == 2 * 2 * 2 * 64 * 7 * 4  # k and v, layers, heads, head size, tokens, bytes
    takes(monkeypatch, lambda batch, call: 1.0)
    assert best_batch_size(model, SHORT, 2.5 * row) == 2

    def full(batch: int, call: int) -> float:
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    takes(monkeypatch, full)
    assert best_batch_size(model, SHORT, ALL) == 4


def test_every_model_with_and_without_grouped_queries_beside_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throughput, "free_memory_bytes", lambda device: FEW_ROWS)
    (record,) = benchmark_throughput(OPTIONS, SHAPE, SHORT)
    names = [name.split(",")[0] for name in record.cases]
    assert names == ["dense", "low_rank", "dense GQA", "low_rank GQA"]
    assert SHAPE.with_grouped_queries().build(None, OPTIONS).config.num_key_value_heads == 1
    dense, low_rank = list(record.cases)[:2]
    assert record.cases[dense]["ideal_speedup"] is None
    sizes = [int(name.rpartition(" ")[2]) for name in (dense, low_rank)]
    reads = [
        weight_bytes(SHAPE.build(name, OPTIONS)) / size
        + 2 * 2 * 2 * 64 * 5 * 4  # filled to 3 prompt tokens and half of 4
        for name, size in zip((None, "low_rank"), sizes, strict=True)
    ]
    assert record.cases[low_rank]["ideal_speedup"] == pytest.approx(reads[0] / reads[1])


def test_a_large_batch_shares_the_weights_and_not_the_cache(model: PreTrainedModel) -> None:
    cache = cache_bytes(model, 5)
    assert token_bytes(model, 1, SHORT) == weight_bytes(model) + cache
    assert token_bytes(model, 100, SHORT) == pytest.approx(weight_bytes(model) / 100 + cache)


def test_what_is_wrong_at_its_batch_size_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "best_batch_size", lambda *args: 2)
    logits = throughput.DecoderRun.logits

    def wrong(self: throughput.DecoderRun) -> torch.Tensor:
        return logits(self) * 1.1

    monkeypatch.setattr(throughput.DecoderRun, "logits", wrong)
    with pytest.raises(NumericError, match="dense: logits in fp32"):
        list(benchmark_throughput(OPTIONS, SHAPE, SHORT))

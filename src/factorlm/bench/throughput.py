"""The most tokens a second: each model at its best batch size (arXiv 2406.16450, table of wide
networks: generation length 256, with and without grouped-query attention). On a CPU with packed
weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from factorlm.bench.cases import BenchmarkCase, measure_cases
from factorlm.bench.decode import (
    DecodeOptions,
    DecoderRun,
    build,
    check_runs,
    generation_settings,
    packed_copy,
    weight_bytes,
)
from factorlm.bench.model import ModelShape
from factorlm.bench.options import DTYPES, BenchOptions
from factorlm.measure import free_memory_bytes
from factorlm.records import BenchmarkRecord

MEMORY_SHARE = 0.7
"""Of the free memory may be taken by the caches of all models."""
WORTH_DOUBLING = 1.05
"""A larger batch has to be so much faster than the best one so far."""
PATIENCE = 2
"""So many sizes in a row may gain nothing before the search ends."""
NUM_TIMED = 3
"""Generations at each size, of which the median counts."""

Tell = Callable[[str], None]
"""Takes what was found so far, a line at a time: the search takes minutes."""


def say_nothing(line: str) -> None:
    """Drop the line."""


def benchmark_throughput(
    options: BenchOptions, shape: ModelShape, decode: DecodeOptions, tell: Tell = say_nothing
) -> Iterator[BenchmarkRecord]:
    """A record for each dtype: every model at the batch size that serves it best."""
    for dtype in options.dtype_names:
        yield measure_throughput(options, shape, decode, dtype, tell)


def measure_throughput(
    options: BenchOptions,
    shape: ModelShape,
    decode: DecodeOptions,
    dtype: str,
    tell: Tell = say_nothing,
) -> BenchmarkRecord:
    """Find each model's best batch size, then time the models there in turns. Raises
    ``NumericError`` if one computes something else."""
    models = {
        f"{name}{suffix}": build(name, options, one, decode).to(DTYPES[dtype])
        for suffix, one in (("", shape), (" GQA", shape.with_grouped_queries()))
        for name in ("dense", *options.structures)
    }
    limit = MEMORY_SHARE * free_memory_bytes(options.device) / len(models)
    cases: dict[str, BenchmarkCase] = {}
    dense_bytes = 0.0
    for name, model in models.items():
        packed = packed_copy(model)
        tell(f"{name}, smaller batches first")
        best = best_batch_size(packed, decode, limit, tell)
        run = DecoderRun(packed, best, decode)
        check_runs({name: run}, model, best, decode, dtype)
        found = token_bytes(model, best, decode)
        dense_bytes = dense_bytes or found
        cases[f"{name}, batch {best}"] = BenchmarkCase(
            run=run,
            ideal_speedup=dense_bytes / found if cases else None,
            num_tokens=best * decode.num_new_tokens,
        )
    tell(f"all at their best sizes, {options.rounds} rounds")
    return measure_cases(
        "throughput",
        generation_settings(options, shape, decode, dtype, models),
        cases,
        device=torch.device(options.device),
        rounds=options.rounds,
        baseline=next(iter(cases)),
        min_round_ms=1.0,
    )


def best_batch_size(
    model: PreTrainedModel, decode: DecodeOptions, limit: float, tell: Tell = say_nothing
) -> int:
    """Doubled from 1 until two sizes in a row gain nothing, while the cache is below ``limit``
    bytes."""
    row = cache_bytes(model, decode.num_prompt_tokens + decode.num_new_tokens)
    best, rate, size, in_vain = 1, 0.0, 1, 0
    while in_vain < PATIENCE and size * row < limit:
        found = rows_per_second(model, size, decode)
        tell(f"batch {size}: {found * decode.num_new_tokens:,.0f} tokens/s")
        if found > rate * WORTH_DOUBLING:
            best, rate, in_vain = size, found, 0
        else:
            in_vain += 1
        size *= 2
    return best


def rows_per_second(model: PreTrainedModel, size: int, decode: DecodeOptions) -> float:
    """Rows of a batch of ``size`` by the median time of its generation; 0 where an accelerator's
    memory is not enough."""
    try:
        run = DecoderRun(model, size, decode)
        run()
        seconds = [_seconds(run) for _ in range(NUM_TIMED)]
    except torch.OutOfMemoryError:
        return 0.0
    return size / statistics.median(seconds)


def _seconds(run: DecoderRun) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def token_bytes(model: PreTrainedModel, batch_size: int, decode: DecodeOptions) -> float:
    """What a token of one row reads: its part of the weights, and its row's cache, filled to the
    middle of what is generated."""
    filled = decode.num_prompt_tokens + decode.num_new_tokens / 2
    return weight_bytes(model) / batch_size + cache_bytes(model, filled)


def cache_bytes(model: PreTrainedModel, num_tokens: float) -> float:
    """Keys and values of one row."""
    config = model.config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return elements * num_tokens * model.dtype.itemsize

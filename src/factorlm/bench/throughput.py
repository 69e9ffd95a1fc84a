"""The most tokens a second: each model at its best batch size (arXiv 2406.16450, table of wide
networks: generation length 256, with and without grouped-query attention). On a CPU with packed
weights."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from factorlm.bench.cases import BenchmarkCase, measure_cases
from factorlm.bench.decode import DecodeOptions, build, generation_settings, ours_of
from factorlm.bench.model import ModelShape
from factorlm.bench.options import DTYPES, BenchOptions
from factorlm.inference import pack_
from factorlm.measure import free_memory_bytes
from factorlm.records import BenchmarkRecord

MEMORY_SHARE = 0.7
"""Of the free memory may be taken by caches."""
WORTH_DOUBLING = 1.05
"""A twice as large batch has to be so much faster to go on."""


def benchmark_throughput(
    options: BenchOptions, shape: ModelShape, decode: DecodeOptions
) -> Iterator[BenchmarkRecord]:
    """A record for each dtype: every model at the batch size that serves it best."""
    for dtype in options.dtype_names:
        yield measure_throughput(options, shape, decode, dtype)


def measure_throughput(
    options: BenchOptions, shape: ModelShape, decode: DecodeOptions, dtype: str
) -> BenchmarkRecord:
    """Find each model's best batch size, then time the models there in turns."""
    models = {
        f"{name}{suffix}": build(name, options, one, decode).to(DTYPES[dtype])
        for suffix, one in (("", shape), (" GQA", shape.with_grouped_queries()))
        for name in ("dense", *options.structures)
    }
    cases = {}
    for name, model in models.items():
        pack_(model)
        best = best_batch_size(model, decode)
        cases[f"{name}, batch {best}"] = BenchmarkCase(
            run=ours_of(model, best, decode), num_tokens=best * decode.num_new_tokens
        )
    return measure_cases(
        "throughput",
        generation_settings(options, shape, decode, dtype),
        cases,
        device=torch.device(options.device),
        rounds=options.rounds,
        baseline=next(iter(cases)),
        min_round_ms=1.0,
    )


def best_batch_size(model: PreTrainedModel, decode: DecodeOptions) -> int:
    """Doubled from 1 as long as that pays and the cache fits the memory."""
    limit = MEMORY_SHARE * free_memory_bytes(model.device)
    best, rate, size = 1, 0.0, 1
    while size * cache_bytes(model, decode) < limit:
        run = ours_of(model, size, decode)
        run()
        started = time.perf_counter()
        run()
        found = size / (time.perf_counter() - started)
        if found < rate * WORTH_DOUBLING:
            break
        best, rate, size = size, found, 2 * size
    return best


def cache_bytes(model: PreTrainedModel, decode: DecodeOptions) -> int:
    """Keys and values of one row."""
    config = model.config
    length = decode.num_prompt_tokens + decode.num_new_tokens
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return elements * length * model.dtype.itemsize

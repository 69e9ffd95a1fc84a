"""Few tokens or many: structured layers that may use a merged copy, beside dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases
from factorlm.bench.kernel import CHECKED_TOKENS, WIDE, step
from factorlm.bench.options import DTYPES, BenchOptions
from factorlm.bench.truth import check_linear
from factorlm.inference import pack_, tune
from factorlm.layers import PreMergedLinear, StructureConfig
from factorlm.records import BenchmarkRecord

ALLOWED_MS = 0.005
"""Beside 3 %, what a layer may take more than a dense one."""
PROMISED_WIDTH = 512
PACKED = "dense, packed"
"""What ``pack_`` makes of a dense layer on a CPU: not what the bars are about, but what is fair to
know."""


def benchmark_premerge(options: BenchOptions) -> Iterator[BenchmarkRecord]:
    """A record for each shape, dtype and number of tokens, of forward passes.

    Each layer is tuned first, which leaves its table in the cache, as ``factorlm tune`` does.
    """
    for shape in options.shapes:
        for dtype in options.dtype_names:
            layers = build_layers(options, shape, dtype)
            for num_tokens in options.num_tokens:
                yield measure_premerge(options, layers, shape, num_tokens, dtype)


def build_layers(options: BenchOptions, shape: tuple[int, int], dtype: str) -> dict[str, nn.Module]:
    """Dense, as PyTorch runs it and packed, and each structure checked, tuned up to the largest
    number of tokens, in eval mode."""
    device, kept = torch.device(options.device), DTYPES[dtype]
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "dense": nn.Linear(*shape, bias=False, device=device, dtype=kept).eval()
    }
    packed = copy.deepcopy(layers["dense"])
    if pack_(nn.Sequential(packed)):
        layers[PACKED] = packed
    for name, config in options.configs(*shape).items():
        layer = config.build(*shape, bias=False, device=device, dtype=kept).eval()
        check_linear(layer, torch.randn(CHECKED_TOKENS, shape[0], device=device, dtype=kept))
        (table,) = tune(nn.Sequential(layer), max_tokens=max(options.num_tokens)).values()
        layers[name] = PreMergedLinear(layer, table.policy)
    return layers


def measure_premerge(
    options: BenchOptions,
    layers: Mapping[str, nn.Module],
    shape: tuple[int, int],
    num_tokens: int,
    dtype: str,
) -> BenchmarkRecord:
    """Time one number of tokens."""
    device = torch.device(options.device)
    x = torch.randn(num_tokens, shape[0], device=device, dtype=DTYPES[dtype])
    cases = {
        name: BenchmarkCase(run=_forward(layer, x), ideal_speedup=_ideal(layer, shape))
        for name, layer in layers.items()
    }
    settings = {
        "shape": list(shape),
        "num_tokens": num_tokens,
        "dtype": dtype,
        "pass": "forward",
        "merged": {
            name: layer.policy.merges(num_tokens)
            for name, layer in layers.items()
            if isinstance(layer, PreMergedLinear)
        },
    }
    return measure_cases(
        "premerge",
        settings,
        cases,
        device=device,
        rounds=options.rounds,
        min_round_ms=2.0,
        bars=partial(premerge_bars, shape, num_tokens, dtype),
    )


def premerge_bars(shape: tuple[int, int], num_tokens: int, dtype: str, times: Timings) -> list[Bar]:
    """Never slower than dense; and with one token, far faster where bytes decide."""
    if min(shape) < PROMISED_WIDTH:
        return []
    bars = [
        Bar(
            name=f"{name} less 5 µs / dense",
            value=times.ratio(name, "dense") - ALLOWED_MS / times.ms("dense"),
            limit=1.03,
        )
        for name in times.by_name
        if name not in ("dense", PACKED)
    ]
    if num_tokens == 1 and shape[0] >= WIDE and dtype == "bf16" and "low_rank" in times:
        speedup = times.ratio("dense", "low_rank")
        bars.append(Bar(name="dense / low_rank", value=speedup, limit=2.5, at_most=False))
    return bars


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    run = step(layer, x, x, "forward")
    run()  # makes the merged copy
    return run


def _ideal(layer: nn.Module, shape: tuple[int, int]) -> float | None:
    if not isinstance(layer, PreMergedLinear):
        return None
    config: StructureConfig = layer.structured.config
    return 2 * shape[0] * shape[1] / config.flops_per_token(*shape)

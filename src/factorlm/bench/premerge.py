"""Few tokens or many: structured layers that may use a merged copy, beside dense ones.

On CUDA every case is captured as a graph: at few tokens Python would take longer than the kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases
from factorlm.bench.kernel import WIDE
from factorlm.bench.options import DTYPES, BenchOptions, quick_start
from factorlm.bench.truth import CHECKED_TOKENS, check_layer, check_outputs
from factorlm.errors import NumericError
from factorlm.inference import pack_, tune
from factorlm.inference.capture import capture
from factorlm.layers import PreMergedLinear, StructuredLinear
from factorlm.ops.low_rank import expects_one_launch
from factorlm.records import BenchmarkRecord

ALLOWED_MS = 0.005
"""Beside 3 %, what a layer may take more than a dense one."""
PROMISED_WIDTH = 512
PROMISED_SHARE = 1 / 3
"""Of the parameters, at most, where a layer is promised to be faster than dense by a factor."""
FUSED = "low_rank, fused kernel"
"""On CUDA, up to 64 tokens: the factors, whatever the table says."""
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
    """Dense, as PyTorch runs it and packed, and each structure, tuned up to the largest number of
    tokens, in eval mode. The factors are checked first (``NumericError``)."""
    device, kept = torch.device(options.device), DTYPES[dtype]
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "dense": nn.Linear(*shape, bias=False, device=device, dtype=kept).eval()
    }
    packed = copy.deepcopy(layers["dense"])
    if pack_(nn.Sequential(packed)):
        layers[PACKED] = packed
    for name, config in options.configs(*shape).items():
        layer = quick_start(config).build(*shape, bias=False, device=device, dtype=kept).eval()
        check_layer(layer, torch.randn(CHECKED_TOKENS, shape[0], device=device, dtype=kept))
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
    """Time one number of tokens. Raises ``NumericError`` if a layer, in the form that is timed,
    computes something else."""
    device = torch.device(options.device)
    x = torch.randn(num_tokens, shape[0], device=device, dtype=DTYPES[dtype])
    layers = {**layers, **_fused(layers, x)}
    cases = {}
    for name, layer in layers.items():
        run = timed_forward(layer, x)
        check_timed(name, run, layer, x)
        cases[name] = BenchmarkCase(run=run, ideal_speedup=_ideal(layer, shape))
    return measure_cases(
        "premerge",
        _settings(options, layers, shape, num_tokens, dtype),
        cases,
        device=device,
        rounds=options.rounds,
        min_round_ms=2.0,
        bars=partial(premerge_bars, shape, num_tokens, dtype, options.share),
    )


def premerge_bars(
    shape: tuple[int, int], num_tokens: int, dtype: str, share: float, times: Timings
) -> list[Bar]:
    """Never slower than dense; far faster where bytes decide: with one token, and on CUDA with
    the fused kernel."""
    if min(shape) < PROMISED_WIDTH:
        return []
    bars = [
        Bar(
            name=f"{name} less 5 µs / dense",
            value=times.ratio(name, "dense") - ALLOWED_MS / times.ms("dense"),
            limit=1.03,
        )
        for name in times.by_name
        if name not in ("dense", PACKED, FUSED)
    ]
    limits = {FUSED: 1.5}
    if num_tokens == 1 and dtype == "bf16":
        limits["low_rank"] = 2.5
    promised = min(shape) >= WIDE and share <= PROMISED_SHARE
    for name, limit in limits.items():
        if promised and name in times:
            speedup = times.ratio("dense", name)
            bars.append(Bar(name=f"dense / {name}", value=speedup, limit=limit, at_most=False))
    return bars


def timed_forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """What is timed: ``layer`` (x (N, I)) -> (N, O) without gradients, its copies made.

    On CUDA a graph, made as that of a step of decoding is: with the merged copy of a
    ``PreMergedLinear`` where its table chooses that, else with its factors.
    """
    run = torch.no_grad()(lambda: layer(x))
    run()
    return capture(run, x.device) if x.is_cuda else run


def check_timed(name: str, run: Callable[[], Tensor], layer: nn.Module, x: Tensor) -> None:
    """What ``run`` returns is x (N, I) times the dense weight of ``layer``, in float64. Raises
    ``NumericError`` naming the case."""
    try:
        check_outputs(lambda _: run(), _factors(layer), x)
    except NumericError as error:
        raise NumericError(f"{name} with {len(x)} tokens: {error}") from None


def _factors(layer: nn.Module) -> nn.Module:
    return layer.structured if isinstance(layer, PreMergedLinear) else layer


def _fused(layers: Mapping[str, nn.Module], x: Tensor) -> dict[str, nn.Module]:
    """The factors of low_rank as a case of their own, where they take one launch."""
    layer = layers.get("low_rank")
    is_fused = expects_one_launch(x.device, x.dtype, len(x))
    return {FUSED: layer.structured} if is_fused and isinstance(layer, PreMergedLinear) else {}


def _settings(
    options: BenchOptions,
    layers: Mapping[str, nn.Module],
    shape: tuple[int, int],
    num_tokens: int,
    dtype: str,
) -> dict[str, Any]:
    tuned = {name: layer for name, layer in layers.items() if isinstance(layer, PreMergedLinear)}
    return {
        "shape": list(shape),
        "num_tokens": num_tokens,
        "dtype": dtype,
        "pass": "forward",
        "share": options.share,
        "structures": {
            name: config.to_target()
            for name, config in options.configs(*shape).items()
            if name in tuned
        },
        "merged": {name: layer.policy.merges(num_tokens) for name, layer in tuned.items()},
        "timed": "CUDA graph" if torch.device(options.device).type == "cuda" else None,
    }


def _ideal(layer: nn.Module, shape: tuple[int, int]) -> float | None:
    layer = _factors(layer)
    if not isinstance(layer, StructuredLinear):
        return None
    return 2 * shape[0] * shape[1] / layer.config.flops_per_token(*shape)

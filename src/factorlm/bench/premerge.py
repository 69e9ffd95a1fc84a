"""Few tokens or many: structured layers that may use a merged copy, beside dense ones.

On CUDA every case is captured as a graph of several layers: at few tokens Python would take longer
than the kernel, and one layer's weights would stay in the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases
from factorlm.bench.kernel import WIDE
from factorlm.bench.options import DTYPES, BenchOptions, quick_start
from factorlm.bench.truth import CHECKED_TOKENS, check_layer, check_outputs
from factorlm.errors import NumericError
from factorlm.inference import pack_, tune
from factorlm.inference.capture import capture
from factorlm.layers import PreMergedLinear, StructureConfig, StructuredLinear
from factorlm.layers.low_rank import LowRankLinear
from factorlm.ops.low_rank import expects_one_launch
from factorlm.records import BenchmarkRecord

ALLOWED_MS = 0.005
"""Beside 3 %, what a layer may take more than a dense one."""
PROMISED_WIDTH = 512
PROMISED_SHARE = 1 / 3
"""Of the parameters, at most, where a layer is promised to be faster than dense by a factor."""
FACTORS = "low_rank, by its factors"
"""On CUDA, up to 64 tokens: whatever the table says, in one launch where that is faster."""
TWO = "low_rank, two matmuls"
"""On CUDA, where its factors take one launch."""
FACTORS_TOKENS = 64
COLD_BYTES, MAX_LAYERS = 2**28, 32
"""On CUDA a graph runs so many layers that they hold this much, several times a cache: decoding,
too, finds no weight there that it reads. Of narrow layers the second number decides."""
PACKED = "dense, packed"
"""What ``pack_`` makes of a dense layer on a CPU: not what the bars are about, but what is fair to
know."""


Layer = TypeVar("Layer", bound=nn.Module)


def benchmark_premerge(options: BenchOptions) -> Iterator[BenchmarkRecord]:
    """A record for each shape, dtype and number of tokens, of forward passes.

    Each layer is tuned first, which leaves its table in the cache, as ``factorlm tune`` does.
    """
    for shape in options.shapes:
        for dtype in options.dtype_names:
            layers = build_layers(options, shape, dtype)
            for num_tokens in options.num_tokens:
                yield measure_premerge(options, layers, shape, num_tokens, dtype)


def build_layers(
    options: BenchOptions, shape: tuple[int, int], dtype: str
) -> dict[str, list[nn.Module]]:
    """Dense, as PyTorch runs it and packed, and each structure, tuned up to the largest number of
    tokens, in eval mode: one layer each, on CUDA as many as ``COLD_BYTES`` hold. The factors are
    checked first (``NumericError``)."""
    device, kept = torch.device(options.device), DTYPES[dtype]
    torch.manual_seed(0)
    configs = {name: quick_start(one) for name, one in options.configs(*shape).items()}
    count = _num_layers(device, shape, list(configs.values()), kept)

    def several(build: Callable[..., Layer]) -> list[Layer]:
        return [build(*shape, bias=False, device=device, dtype=kept).eval() for _ in range(count)]

    layers: dict[str, list[nn.Module]] = {"dense": [*several(nn.Linear)]}
    packed = copy.deepcopy(layers["dense"])
    if pack_(nn.Sequential(*packed)):
        layers[PACKED] = packed
    for name, config in configs.items():
        built = several(config.build)
        check_layer(built[0], torch.randn(CHECKED_TOKENS, shape[0], device=device, dtype=kept))
        (table,) = tune(nn.Sequential(*built), max_tokens=max(options.num_tokens)).values()
        layers[name] = [PreMergedLinear(layer, table.policy) for layer in built]
    return layers


def _num_layers(
    device: torch.device, shape: tuple[int, int], configs: list[StructureConfig], kept: torch.dtype
) -> int:
    if device.type != "cuda":
        return 1
    weights = [config.flops_per_token(*shape) // 2 for config in configs]
    smallest = min([shape[0] * shape[1], *weights]) * kept.itemsize
    return min(-(-COLD_BYTES // smallest), MAX_LAYERS)


def measure_premerge(
    options: BenchOptions,
    layers: Mapping[str, list[nn.Module]],
    shape: tuple[int, int],
    num_tokens: int,
    dtype: str,
) -> BenchmarkRecord:
    """Time one number of tokens. Raises ``NumericError`` if a layer, in the form that is timed,
    computes something else."""
    device = torch.device(options.device)
    x = torch.randn(num_tokens, shape[0], device=device, dtype=DTYPES[dtype])
    layers = {**layers, **_forms(layers, x)}
    cases = {}
    for name, several in layers.items():
        run = timed_forward(several, x)
        check_timed(name, run, several[-1], x)
        ideal = _ideal(several[0], shape)
        cases[name] = BenchmarkCase(run=run, ideal_speedup=ideal, num_layers=len(several))
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
    """Never slower than dense; far faster where bytes decide: with one token, and on CUDA by the
    factors."""
    if min(shape) < PROMISED_WIDTH:
        return []
    bars = [
        Bar(
            name=f"{name} less 5 µs / dense",
            value=times.ratio(name, "dense") - ALLOWED_MS / times.ms("dense"),
            limit=1.03,
        )
        for name in times.by_name
        if name not in ("dense", PACKED, FACTORS, TWO)
    ]
    limits = {FACTORS: 1.5}
    if num_tokens == 1 and dtype == "bf16" and FACTORS not in times:  # on a CPU
        limits["low_rank"] = 2.5
    promised = min(shape) >= WIDE and share <= PROMISED_SHARE
    for name, limit in limits.items():
        if promised and name in times:
            speedup = times.ratio("dense", name)
            bars.append(Bar(name=f"dense / {name}", value=speedup, limit=limit, at_most=False))
    return bars


def timed_forward(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """What is timed: each of ``layers`` (x (N, I)) -> (N, O) without gradients, its copies made,
    and the last one's result.

    On CUDA a graph, made as that of a step of decoding is: with the merged copy of a
    ``PreMergedLinear`` where its table chooses that, else with its factors.
    """

    @torch.no_grad()
    def run() -> Tensor:
        return [layer(x) for layer in layers][-1]

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
    return layer.structured if isinstance(layer, PreMergedLinear | _TwoMatmuls) else layer


class _TwoMatmuls(nn.Module):
    """The factors of a low_rank layer without the kernel for few tokens."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.structured = layer

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.structured.V), self.structured.U)


def _forms(layers: Mapping[str, list[nn.Module]], x: Tensor) -> dict[str, list[nn.Module]]:
    """The factors of low_rank as a case of their own, and where they take one launch, as two."""
    wrapped = [one for one in layers.get("low_rank", []) if isinstance(one, PreMergedLinear)]
    factors = [one.structured for one in wrapped if isinstance(one.structured, LowRankLinear)]
    if not (factors and x.is_cuda and len(x) <= FACTORS_TOKENS):
        return {}
    num_weights = sum(matrix.numel() for matrix in factors[0].matrices())
    forms: dict[str, list[nn.Module]] = {FACTORS: list(factors)}
    if expects_one_launch(x.device, x.dtype, len(x), num_weights):
        forms[TWO] = [_TwoMatmuls(layer) for layer in factors]
    return forms


def _settings(
    options: BenchOptions,
    layers: Mapping[str, list[nn.Module]],
    shape: tuple[int, int],
    num_tokens: int,
    dtype: str,
) -> dict[str, Any]:
    firsts = {name: several[0] for name, several in layers.items()}
    tuned = {name: layer for name, layer in firsts.items() if isinstance(layer, PreMergedLinear)}
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
        "num_layers": len(layers["dense"]),
    }


def _ideal(layer: nn.Module, shape: tuple[int, int]) -> float | None:
    layer = _factors(layer)
    if not isinstance(layer, StructuredLinear):
        return None
    return 2 * shape[0] * shape[1] / layer.config.flops_per_token(*shape)

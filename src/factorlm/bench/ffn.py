"""A whole FFN, up, GELU and down with biases: dense and each structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.kernel import CHECKED_TOKENS, WIDE, is_promised, step
from factorlm.bench.options import DTYPES, BenchOptions, Pass
from factorlm.bench.truth import check_linear
from factorlm.layers import StructuredLinear
from factorlm.records import BenchmarkRecord

ACTIVATION = "GELU alone"


class FFN(nn.Module):
    """The paper's FFN: ``up`` (I -> O), exact GELU, ``down`` (O -> I)."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, I)."""
        y: Tensor = self.down(gelu(self.up(x)))
        return y


class _Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def benchmark_ffn(options: BenchOptions) -> Iterator[BenchmarkRecord]:
    """A record for each shape, number of tokens, dtype and pass."""
    for shape in options.shapes:
        for num_tokens in options.num_tokens:
            for dtype in options.dtype_names:
                for kind in options.passes:
                    yield measure_ffn(options, shape, num_tokens, dtype, kind)


def measure_ffn(
    options: BenchOptions, shape: tuple[int, int], num_tokens: int, dtype: str, kind: Pass
) -> BenchmarkRecord:
    """Time one setting. Raises ``NumericError`` if a layer computes something else."""
    device, kept = torch.device(options.device), DTYPES[dtype]
    torch.manual_seed(0)
    x, slope = torch.randn(2, num_tokens, shape[0], device=device, dtype=kept)
    models = build_ffns(options, shape, x)
    flops = {name: _flops(model, shape) for name, model in models.items()}
    cases = {
        name: BenchmarkCase(
            run=step(model, x, slope, kind),
            ideal_speedup=None if name == "dense" else flops["dense"] / flops[name],
        )
        for name, model in models.items()
    }
    wide = torch.randn(num_tokens, shape[1], device=device, dtype=kept)
    cases[ACTIVATION] = BenchmarkCase(run=step(_Activation(), wide, wide, kind))
    settings = {
        "shape": list(shape),
        "num_tokens": num_tokens,
        "dtype": dtype,
        "pass": kind,
        "structures": {
            name: config.to_target() for name, config in options.configs(*shape).items()
        },
    }
    promised = is_promised(shape, num_tokens)
    return measure_cases(
        "ffn",
        settings,
        cases,
        device=device,
        rounds=options.rounds,
        bars=partial(ffn_bars, flops, shape, kind) if promised else no_bars,
    )


def build_ffns(options: BenchOptions, shape: tuple[int, int], x: Tensor) -> dict[str, nn.Module]:
    """Dense and each structure, checked on some of the tokens ``x`` (N, I)."""
    back = (shape[1], shape[0])
    dense = (nn.Linear(*sizes, device=x.device, dtype=x.dtype) for sizes in (shape, back))
    models: dict[str, nn.Module] = {"dense": FFN(*dense)}
    ups, downs = options.configs(*shape), options.configs(*back)
    few = x[:CHECKED_TOKENS]
    for name in ups:
        up = ups[name].build(*shape, device=x.device, dtype=x.dtype)
        down = downs[name].build(*back, device=x.device, dtype=x.dtype)
        check_linear(up, few)
        check_linear(down, up(few).detach())
        models[name] = FFN(up, down)
    return models


def ffn_bars(
    flops: Mapping[str, float], shape: tuple[int, int], kind: Pass, times: Timings
) -> list[Bar]:
    """low_rank against what its FLOPs allow, with the activation paid in full."""
    if kind == "forward" or "low_rank" not in times:
        return []
    dense, activation = times.ms("dense"), times.ms(ACTIVATION)
    ratio = flops["dense"] / flops["low_rank"]
    possible = dense / ((dense - activation) / ratio + activation)
    speedup = times.ratio("dense", "low_rank")
    name = "dense / low_rank, by what FLOPs and GELU allow"
    bars = [Bar(name=name, value=speedup / possible, limit=0.93, at_most=False)]
    if min(shape) >= WIDE and ratio >= 3:
        bars.append(Bar(name="dense / low_rank", value=speedup, limit=2.9, at_most=False))
    return bars


def _flops(model: nn.Module, shape: tuple[int, int]) -> int:
    """Forward matmul FLOPs of a token."""
    layers = [layer for layer in model.modules() if isinstance(layer, StructuredLinear)]
    if not layers:
        return 4 * shape[0] * shape[1]
    return sum(
        layer.config.flops_per_token(layer.in_features, layer.out_features) for layer in layers
    )

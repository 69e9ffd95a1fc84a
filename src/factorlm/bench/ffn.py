"""A whole FFN, up, GELU and down with biases: dense and each structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.kernel import CHECKED_TOKENS, WIDE, step
from factorlm.bench.options import BenchOptions, LinearSetting
from factorlm.bench.truth import check_linear
from factorlm.layers import StructureConfig, StructuredLinear
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
    for setting in options.linear_settings():
        backward = options.configs(*setting.shape[::-1])
        yield measure_ffn(setting, backward, options.rounds)


def measure_ffn(
    setting: LinearSetting, downs: Mapping[str, StructureConfig], rounds: int
) -> BenchmarkRecord:
    """Time one setting; ``downs`` are the configs of the way back. Raises ``NumericError`` if a
    layer computes something else."""
    shape, kind, like = setting.shape, setting.kind, setting.like
    torch.manual_seed(0)
    x, slope = torch.randn(2, setting.num_tokens, shape[0]).to(like)
    models = build_ffns(setting, downs, x)
    flops = {name: _flops(model, shape) for name, model in models.items()}
    cases = {
        name: BenchmarkCase(
            run=step(model, x, slope, kind),
            ideal_speedup=None if name == "dense" else flops["dense"] / flops[name],
        )
        for name, model in models.items()
    }
    wide = torch.randn(setting.num_tokens, shape[1]).to(like)
    cases[ACTIVATION] = BenchmarkCase(run=step(_Activation(), wide, wide, kind))
    return measure_cases(
        "ffn",
        setting.to_dict(),
        cases,
        device=setting.device,
        rounds=rounds,
        bars=partial(ffn_bars, flops, setting) if setting.is_promised else no_bars,
    )


def build_ffns(
    setting: LinearSetting, downs: Mapping[str, StructureConfig], x: Tensor
) -> dict[str, nn.Module]:
    """Dense and each structure, checked on some of the tokens ``x`` (N, I)."""
    shape, back = setting.shape, setting.shape[::-1]
    dense = FFN(nn.Linear(*shape), nn.Linear(*back))
    models: dict[str, nn.Module] = {"dense": dense.to(x)}
    few = x[:CHECKED_TOKENS]
    for name, config in setting.configs.items():
        up, down = config.build(*shape).to(x), downs[name].build(*back).to(x)
        check_linear(up, few)
        check_linear(down, up(few).detach())
        models[name] = FFN(up, down)
    return models


def ffn_bars(flops: Mapping[str, float], setting: LinearSetting, times: Timings) -> list[Bar]:
    """low_rank against what its FLOPs allow, with the activation paid in full."""
    if setting.kind == "forward" or "low_rank" not in times:
        return []
    dense, activation = times.ms("dense"), times.ms(ACTIVATION)
    ratio = flops["dense"] / flops["low_rank"]
    possible = dense / ((dense - activation) / ratio + activation)
    speedup = times.ratio("dense", "low_rank")
    name = "dense / low_rank, by what FLOPs and GELU allow"
    bars = [Bar(name=name, value=speedup / possible, limit=0.93, at_most=False)]
    if min(setting.shape) >= WIDE and ratio >= 3:
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

"""One linear layer: dense, each structure, the structure's bare matmuls, a guided step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.options import BenchOptions, LinearSetting, Pass
from factorlm.bench.truth import check_guided, check_linear
from factorlm.layers import LowRankConfig, SelfGuidedLinear, StructureConfig, StructuredLinear
from factorlm.records import BenchmarkRecord

CHECKED_TOKENS = 64
BARE = "bare matmuls"
GUIDED = "guided (merged)"
GUIDED_TOKENS = 16384
"""From so many tokens on, a guided training step is timed too."""
WIDE = 2048
"""The width from which a low_rank linear is promised to be three times as fast."""


def benchmark_kernel(options: BenchOptions) -> Iterator[BenchmarkRecord]:
    """A record for each shape, number of tokens, dtype and pass."""
    for setting in options.linear_settings():
        yield measure_linear(setting, options.rounds)


def measure_linear(setting: LinearSetting, rounds: int) -> BenchmarkRecord:
    """Time one setting. Raises ``NumericError`` if a layer computes something else."""
    shape, kind, like = setting.shape, setting.kind, setting.like
    torch.manual_seed(0)
    x, slope = (torch.randn(setting.num_tokens, size).to(like) for size in shape)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(*shape, bias=False).to(like)}
    for name, config in setting.configs.items():
        layer = config.build(*shape, bias=False).to(like)
        check_linear(layer, x[:CHECKED_TOKENS])
        layers[name] = layer
    cases = {
        name: BenchmarkCase(run=step(layer, x, slope, kind), ideal_speedup=_ideal(layer, shape))
        for name, layer in layers.items()
    }
    cases |= _more_cases(layers.get("low_rank"), x, slope, kind)
    return measure_cases(
        "kernel",
        setting.to_dict(),
        cases,
        device=setting.device,
        rounds=rounds,
        bars=partial(kernel_bars, setting) if setting.is_promised else no_bars,
    )


def step(layer: nn.Module, x: Tensor, slope: Tensor, kind: Pass) -> Callable[[], object]:
    """A forward pass without gradients, or one with the backward pass to input and weights."""
    if kind == "forward":
        return torch.no_grad()(lambda: layer(x))
    leaf = x.detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        layer.zero_grad(set_to_none=True)
        layer(leaf).backward(slope)

    return run


def bare_matmuls(
    V: Tensor, U: Tensor, x: Tensor, slope: Tensor, kind: Pass
) -> Callable[[], object]:
    """The matmuls of U(Vx) alone, two forward and four backward, each into new memory."""

    @torch.no_grad()
    def run() -> object:
        hidden = x @ V.t()
        y = hidden @ U.t()
        if kind == "forward":
            return y
        hidden_slope = slope @ U
        return y, slope.t() @ hidden, hidden_slope @ V, hidden_slope.t() @ x

    return run


def kernel_bars(setting: LinearSetting, times: Timings) -> list[Bar]:
    """What is promised of a linear at a low share of the parameters."""
    shape, configs = setting.shape, setting.configs
    bars = []
    if BARE in times:
        name = "low_rank / its bare matmuls"
        bars.append(Bar(name=name, value=times.ratio("low_rank", BARE), limit=1.03))
    if setting.kind == "forward":
        return bars
    if "low_rank" in times and min(shape) >= WIDE and _share(configs, shape) <= 1 / 3:
        speedup = times.ratio("dense", "low_rank")
        bars.append(Bar(name="dense / low_rank", value=speedup, limit=3.0, at_most=False))
    if GUIDED in times:
        ratio = times.ratio(GUIDED, "dense")
        bars.append(Bar(name="guided (merged) / dense", value=ratio, limit=1.10))
    for other, limit in (("block_dense", 1.05), ("block_shuffle", 1.10)):
        if {"low_rank", other} <= configs.keys():
            flops = [configs[name].flops_per_token(*shape) for name in (other, "low_rank")]
            value = times.ratio(other, "low_rank") * flops[1] / flops[0]
            bars.append(Bar(name=f"{other} / low_rank, per FLOP", value=value, limit=limit))
    return bars


def _share(configs: Mapping[str, StructureConfig], shape: tuple[int, int]) -> float:
    return configs["low_rank"].num_params(*shape) / (shape[0] * shape[1])


def _ideal(layer: nn.Module, shape: tuple[int, int]) -> float | None:
    if not isinstance(layer, StructuredLinear):
        return None
    return 2 * shape[0] * shape[1] / layer.config.flops_per_token(*shape)


def _more_cases(
    low_rank: nn.Module | None, x: Tensor, slope: Tensor, kind: Pass
) -> dict[str, BenchmarkCase]:
    """The bare matmuls of low_rank, and from 16k tokens on a guided step of it."""
    if not isinstance(low_rank, StructuredLinear) or not isinstance(low_rank.config, LowRankConfig):
        return {}
    V, U = (low_rank.get_parameter(factor.name) for factor in low_rank.factors)
    shape = (low_rank.in_features, low_rank.out_features)
    found = {
        BARE: BenchmarkCase(
            run=bare_matmuls(V, U, x, slope, kind), ideal_speedup=_ideal(low_rank, shape)
        )
    }
    if kind == "forward+backward" and x.shape[0] >= GUIDED_TOKENS:
        copied = low_rank.config.build(*shape, bias=False, device=x.device, dtype=x.dtype)
        guided = SelfGuidedLinear(copied, form="merged")
        guided.set_alpha(0.5)
        check_guided(guided, x[:CHECKED_TOKENS])
        found[GUIDED] = BenchmarkCase(run=step(guided, x, slope, kind), ideal_speedup=1.0)
    return found

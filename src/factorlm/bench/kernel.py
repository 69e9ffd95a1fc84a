"""One linear layer: dense, each structure beside its bare matmuls, a guided step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from factorlm.bench.bare import bare, bare_matmuls, factors_of
from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.options import BenchOptions, LinearSetting, Pass, quick_start
from factorlm.bench.truth import check_layer
from factorlm.layers import LowRankConfig, SelfGuidedLinear, StructureConfig, StructuredLinear
from factorlm.records import BenchmarkRecord

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
    (x,), (slope,) = (setting.draw(size) for size in shape)
    plain: dict[str, Any] = {"bias": False, "device": setting.device}
    layers: dict[str, nn.Module] = {"dense": nn.Linear(*shape, **plain).to(like)}
    for name, config in setting.configs.items():
        layers[name] = quick_start(config).build(*shape, **plain).to(like)
    cases = {}
    for name, layer in layers.items():
        check_layer(layer, x)
        run, ideal = step(layer, x, slope, kind), _ideal(layer, shape)
        cases[name] = BenchmarkCase(run=run, ideal_speedup=ideal)
    cases |= _bare_cases(layers, x, slope, kind) | _guided_case(layers, x, slope, kind)
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


def kernel_bars(setting: LinearSetting, times: Timings) -> list[Bar]:
    """What is promised of a linear at a low share of the parameters."""
    bars = []
    if bare("low_rank") in times:
        value = times.ratio("low_rank", bare("low_rank"))
        bars.append(Bar(name="low_rank / its bare matmuls", value=value, limit=1.03))
    bars += _per_flop_bars(setting, times)
    if setting.kind == "forward":
        return bars
    shape = setting.shape
    if "low_rank" in times and min(shape) >= WIDE and _share(setting.configs, shape) <= 1 / 3:
        speedup = times.ratio("dense", "low_rank")
        bars.append(Bar(name="dense / low_rank", value=speedup, limit=3.0, at_most=False))
    if GUIDED in times:
        ratio = times.ratio(GUIDED, "dense")
        bars.append(Bar(name="guided (merged) / dense", value=ratio, limit=1.10))
    return bars


def _per_flop_bars(setting: LinearSetting, times: Timings) -> list[Bar]:
    """block_dense is held against low_rank in both passes, block_shuffle in the whole step."""
    shape, configs = setting.shape, setting.configs
    limits = {"block_dense": 1.05}
    if setting.kind == "forward+backward":
        limits["block_shuffle"] = 1.10
    bars = []
    for other, limit in limits.items():
        if {"low_rank", other} <= configs.keys():
            flops = [configs[name].flops_per_token(*shape) for name in (other, "low_rank")]
            value = times.ratio(other, "low_rank") * flops[1] / flops[0]
            name = f"{other} / low_rank, per FLOP, {setting.kind}"
            bars.append(Bar(name=name, value=value, limit=limit))
    return bars


def _share(configs: Mapping[str, StructureConfig], shape: tuple[int, int]) -> float:
    return configs["low_rank"].num_params(*shape) / (shape[0] * shape[1])


def _ideal(layer: nn.Module, shape: tuple[int, int]) -> float | None:
    if not isinstance(layer, StructuredLinear):
        return None
    return 2 * shape[0] * shape[1] / layer.config.flops_per_token(*shape)


def _bare_cases(
    layers: Mapping[str, nn.Module], x: Tensor, slope: Tensor, kind: Pass
) -> dict[str, BenchmarkCase]:
    """The bare matmuls of each structure; dense is little else."""
    found = {}
    for name, layer in layers.items():
        factors = factors_of(layer)
        if name != "dense" and factors:
            run, shape = bare_matmuls(factors, x, slope, kind), (x.shape[1], slope.shape[1])
            found[bare(name)] = BenchmarkCase(run=run, ideal_speedup=_ideal(layer, shape))
    return found


def _guided_case(
    layers: Mapping[str, nn.Module], x: Tensor, slope: Tensor, kind: Pass
) -> dict[str, BenchmarkCase]:
    """From 16k tokens on a guided step of low_rank."""
    layer = layers.get("low_rank")
    if not isinstance(layer, StructuredLinear) or not isinstance(layer.config, LowRankConfig):
        return {}
    if kind == "forward" or x.shape[0] < GUIDED_TOKENS:
        return {}
    shape = (layer.in_features, layer.out_features)
    copied = layer.config.build(*shape, bias=False, device=x.device, dtype=x.dtype)
    guided = SelfGuidedLinear(copied, form="merged")
    guided.set_alpha(0.5)
    check_layer(guided, x)
    return {GUIDED: BenchmarkCase(run=step(guided, x, slope, kind), ideal_speedup=1.0)}

"""A whole FFN, dense and of each structure, beside the matmuls, the activation and the sums for
biases that it cannot do without: what is left of its time is neither."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from factorlm.bench.bare import bare, bare_matmuls, factors_of
from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases, no_bars
from factorlm.bench.kernel import WIDE, step
from factorlm.bench.options import BenchOptions, LinearSetting, Pass, quick_start
from factorlm.bench.truth import check_layer
from factorlm.layers import StructureConfig, StructuredLinear
from factorlm.records import BenchmarkRecord

ACTIVATION = "GELU alone"
GATE = "SwiGLU alone"
BIASES = "bias gradients alone"
SPLIT = ("dense", "low_rank")
"""The FFNs whose matmuls are timed alone, and that are compiled too if that is asked for."""
GPU_BARS = {"low_rank": 2.9, "block_shuffle": 2.6}
GPU_WIDTH, GPU_TOKENS = 5120, 30000
"""From there on a forward pass in bf16 on a GPU of the H200's class is promised to be so many times
as fast as dense."""


class FFN(nn.Module):
    """The paper's FFN: ``up`` (I -> O), exact GELU, ``down`` (O -> I)."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, I)."""
        up = self.up
        wide = up.forward_gelu(x) if isinstance(up, StructuredLinear) else gelu(up(x))
        y: Tensor = self.down(wide)
        return y


class GatedFFN(nn.Module):
    """Llama's FFN: ``down`` (O -> I) of SwiGLU, silu(``gate`` x) times ``up`` x (I -> O)."""

    def __init__(self, up: nn.Module, gate: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.gate, self.down = up, gate, down

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, I)."""
        y: Tensor = self.down(swiglu(self.up(x), self.gate(x)))
        return y


def swiglu(up: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) times up, (*, O) each."""
    return silu(gate) * up


def benchmark_ffn(options: BenchOptions) -> Iterator[BenchmarkRecord]:
    """A record for each shape, number of tokens, dtype and pass."""
    for setting in options.linear_settings():
        backward = options.configs(*setting.shape[::-1])
        yield measure_ffn(setting, backward, options)


def measure_ffn(
    setting: LinearSetting, downs: Mapping[str, StructureConfig], options: BenchOptions
) -> BenchmarkRecord:
    """Time one setting; ``downs`` are the configs of the way back. Raises ``NumericError`` if an
    FFN computes something else."""
    torch.manual_seed(0)
    models = build_ffns(setting, downs, gated=options.gated)
    x, slope = setting.draw(setting.shape[0], count=2)
    cases = _whole_cases(models, x, slope, setting.kind, compiled=options.compiled)
    cases |= _part_cases(models, x, slope, setting)
    flops = {name: _flops(model) for name, model in models.items()}
    promised = setting.is_promised and not options.gated
    return measure_cases(
        "ffn",
        setting.to_dict() | ({"activation": "SwiGLU"} if options.gated else {}),
        cases,
        device=setting.device,
        rounds=options.rounds,
        bars=partial(ffn_bars, flops, setting) if promised else no_bars,
    )


def build_ffns(
    setting: LinearSetting, downs: Mapping[str, StructureConfig], *, gated: bool = False
) -> dict[str, FFN | GatedFFN]:
    """Dense and each structure: with GELU and biases, or gated without biases, as in Llama."""
    options: dict[str, Any] = {"bias": not gated, "device": setting.device}
    make: Callable[..., FFN | GatedFFN] = GatedFFN if gated else FFN
    makers: dict[str, list[Callable[..., nn.Module]]] = {"dense": [nn.Linear, nn.Linear]}
    for name, config in setting.configs.items():
        makers[name] = [quick_start(one).build for one in (config, downs[name])]
    models = {}
    for name, (up, down) in makers.items():
        wide = [up(*setting.shape, **options) for _ in range(2 if gated else 1)]
        back = down(*setting.shape[::-1], **options)
        models[name] = make(*wide, back).to(setting.like)
    return models


def _whole_cases(
    models: Mapping[str, nn.Module], x: Tensor, slope: Tensor, kind: Pass, *, compiled: bool
) -> dict[str, BenchmarkCase]:
    """Each FFN, checked on the tokens ``x`` (N, I)."""
    forms: dict[str, tuple[nn.Module, Any]] = {name: (m, m) for name, m in models.items()}
    if compiled:
        torch.compiler.reset()  # it refuses many forms of one function
        for name in _split(models):
            faster = torch.compile(models[name], fullgraph=True, dynamic=False)
            forms[f"{name}, compiled"] = models[name], faster
    cases = {}
    for name, (model, run) in forms.items():
        check_layer(model, x, run)
        ideal = None if name == "dense" else _flops(models["dense"]) / _flops(model)
        cases[name] = BenchmarkCase(run=step(run, x, slope, kind), ideal_speedup=ideal)
    return cases


def _part_cases(
    models: Mapping[str, FFN | GatedFFN], x: Tensor, slope: Tensor, setting: LinearSetting
) -> dict[str, BenchmarkCase]:
    """What an FFN cannot do without: matmuls, the activation, the gradients of biases."""
    kind = setting.kind
    wide = setting.draw(setting.shape[1], count=2)
    runs: dict[str, Callable[[], object]] = {
        bare(name): ffn_matmuls(models[name], x, slope, wide[0], kind) for name in _split(models)
    }
    if isinstance(models["dense"], GatedFFN):
        runs[GATE] = activation_step(swiglu, wide, wide[0], kind)
    else:
        runs[ACTIVATION] = activation_step(gelu, wide[:1], wide[1], kind)
        if kind == "forward+backward":  # in a forward pass the matmuls add the biases
            runs[BIASES] = lambda: (wide[0].sum(0), slope.sum(0))
    return {name: BenchmarkCase(run=run) for name, run in runs.items()}


def _split(models: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in SPLIT if name in models]


def ffn_matmuls(
    model: FFN | GatedFFN, x: Tensor, slope: Tensor, wide: Tensor, kind: Pass
) -> Callable[[], object]:
    """The matmuls of ``model`` for x (N, I), slope (N, I), those of a gate with wide (N, O)."""
    both = bare_matmuls(factors_of(model.up, model.down), x, slope, kind)
    if isinstance(model, FFN):
        return both
    gate = bare_matmuls(factors_of(model.gate), x, wide, kind)
    return lambda: (both(), gate())


def activation_step(
    activation: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor, kind: Pass
) -> Callable[[], object]:
    """``activation`` of inputs (N, O), without gradients or with its own backward pass."""
    if kind == "forward":
        return torch.no_grad()(lambda: activation(*inputs))
    leaves = [given.detach().requires_grad_() for given in inputs]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        activation(*leaves).backward(slope)

    return run


def ffn_bars(flops: Mapping[str, float], setting: LinearSetting, times: Timings) -> list[Bar]:
    """low_rank against what its FLOPs allow, with the activation paid in full; on a GPU a forward
    pass against dense."""
    if setting.kind == "forward":
        return _gpu_bars(flops, setting, times)
    if "low_rank" not in times:
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


def _gpu_bars(flops: Mapping[str, float], setting: LinearSetting, times: Timings) -> list[Bar]:
    large = min(setting.shape) >= GPU_WIDTH and setting.num_tokens >= GPU_TOKENS
    if not (setting.device.type == "cuda" and setting.dtype == "bf16" and large):
        return []
    return [
        Bar(
            name=f"dense / {name}, forward",
            value=times.ratio("dense", name),
            limit=limit,
            at_most=False,
        )
        for name, limit in GPU_BARS.items()
        if name in times and flops["dense"] / flops[name] >= 3
    ]


def _flops(model: nn.Module) -> int:
    """Forward matmul FLOPs of a token."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            total += 2 * layer.in_features * layer.out_features
        elif isinstance(layer, StructuredLinear):
            total += layer.config.flops_per_token(layer.in_features, layer.out_features)
    return total

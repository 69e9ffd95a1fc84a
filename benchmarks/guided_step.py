"""Cost of a guided step of one layer: dense, structured, merged and two-path, alternating.

Each case is the forward and backward pass of one linear layer on the same tokens. Before anything
is timed, the merged form is compared with the two-path form in float64, gradients included.

    python benchmarks/guided_step.py --output reports/guided_step/records/guided_step.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _publish import publish
from torch import nn

from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    SelfGuidedLinear,
    StructureConfig,
)
from factorlm.layers.self_guided import GuideForm
from factorlm.measure import environment, has_fast_bf16, measure_latency

RATIO = 0.32
BAR = 1.10
"""A merged low_rank step against a dense one."""


def configs(in_features: int, out_features: int) -> dict[str, StructureConfig]:
    """The three structures at about 32 % of the weights (low_rank 768 x 3072: R = 192)."""
    shapes = (in_features, out_features)
    return {
        "low_rank": LowRankConfig().for_param_ratio(*shapes, 0.3125),
        "block_shuffle": BlockShuffleConfig().for_param_ratio(*shapes, RATIO),
        "block_dense": BlockDenseConfig().for_param_ratio(*shapes, RATIO, multiple_of=64),
    }


def guided(config: StructureConfig, sizes: tuple[int, int], form: GuideForm) -> SelfGuidedLinear:
    torch.manual_seed(0)
    layer = SelfGuidedLinear(config.build(*sizes), form=form)
    layer.set_alpha(0.5)
    return layer


def check_exact(config: StructureConfig, sizes: tuple[int, int]) -> None:
    """Merged equals two-path in float64: refuse to time a wrong result."""
    results = []
    for form in ("merged", "two_path"):
        layer = guided(config, sizes, form).double()
        x = torch.linspace(-1, 1, 8 * sizes[0], dtype=torch.float64).view(8, -1).requires_grad_()
        layer(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for merged, two_path in zip(*results, strict=True):
        torch.testing.assert_close(merged, two_path, rtol=1e-9, atol=1e-9)


def step(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor, half: bool) -> Callable[[], None]:
    """One forward and backward pass, with gradients of the input and of the weights."""

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            y = layer(x)
        y.backward(slope.to(y.dtype))

    return run


def measure(args: argparse.Namespace, half: bool) -> dict[str, dict[str, float]]:
    sizes = (args.in_features, args.out_features)
    device = torch.device(args.device)
    x = torch.randn(args.tokens, sizes[0], device=device, requires_grad=True)
    slope = torch.randn(args.tokens, sizes[1], device=device)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(*sizes)}
    for name, config in configs(*sizes).items():
        check_exact(config, sizes)
        layers[name] = config.build(*sizes)
        for form in ("merged", "two_path"):
            layers[f"{name} {form}"] = guided(config, sizes, form)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = measure_latency(
        {name: step(layer.to(device), x, slope, half) for name, layer in layers.items()},
        rounds=args.rounds,
        min_round_ms=1,
        synchronize=synchronize,
    )
    dense = found["dense"]
    return {
        name: {
            "median_ms": round(case.median_ms, 3),
            "spread_ms": round(case.spread_ms, 3),
            "ratio_to_dense": round(case.ratio_to(dense), 4),
        }
        for name, case in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--in-features", type=int, default=768)
    parser.add_argument("--out-features", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="append the result as one line of JSON")
    args = parser.parse_args()
    dtypes = {"fp32": False} | ({"bf16": True} if has_fast_bf16(args.device) else {})
    result = {
        "benchmark": "guided_step",
        "environment": environment(torch.device(args.device)),
        "tokens": args.tokens,
        "sizes": [args.in_features, args.out_features],
        "structures": {
            name: config.to_dict()
            for name, config in configs(args.in_features, args.out_features).items()
        },
        "bars": {"low_rank merged": BAR},
        "cases": {name: measure(args, half) for name, half in dtypes.items()},
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()

"""Where the time of a whole-model training step goes: dense beside low_rank, by kind of operation.

    python benchmarks/model_profile.py --output reports/speed/model_profile.jsonl

The step is that of `factorlm bench model`, under torch's profiler, dense and low_rank in turn.
Times are of the operations themselves, on the CPU, without what they call; their sum is the step
but for Python's own time and the profiler's. `allowed` is the ratio that would be left if the
matmuls alone took less, by their FLOPs, and everything else what it takes in the dense model.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from _publish import publish
from torch.profiler import ProfilerActivity, profile

from factorlm.accounting import training_flops
from factorlm.bench.model import ModelShape, training_step
from factorlm.bench.options import BenchOptions
from factorlm.measure import environment
from factorlm.memory import keep_freed_memory

KINDS = {
    "matmuls": ("mm", "addmm", "bmm", "linear", "matmul", "mkldnn"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "casts and copies": ("copy_", "_to_copy", "clone", "contiguous", "cat"),
    "layer norms": ("layer_norm",),
    "activations": ("gelu", "silu"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "logsumexp", "embedding"),
    "optimizer and clipping": ("_fused_adam", "linalg_vector_norm", "_foreach", "adamw"),
    "sums and products by element": ("sum", "add", "mul", "neg"),
}
"""Kind -> parts of the names of its operations; the first that fits counts."""
OTHER = "other"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="a step (default: 8192)")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="of dense and low_rank in turn")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, help="append the record to this file")
    args = parser.parse_args()
    keep_freed_memory()
    for dtype in args.dtypes:
        publish(profile_dtype(args, dtype), args.output)


def profile_dtype(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Milliseconds a step by kind, medians over the rounds, of both models."""
    shape = ModelShape(width=args.width, num_layers=args.layers)
    options = BenchOptions(num_tokens=(args.tokens,), dtypes=(dtype,), structures=("low_rank",))
    rows = args.tokens // shape.context_length
    models = {kind or "dense": shape.build(kind, options) for kind in (None, "low_rank")}
    steps = {name: training_step(model, rows, shape, dtype) for name, model in models.items()}
    for step in steps.values():
        step()
    rounds = [{name: by_kind(step) for name, step in steps.items()} for _ in range(args.rounds)]
    flops = {
        name: training_flops(
            model, num_tokens=args.tokens, seq_len=shape.context_length
        ).model_flops
        for name, model in models.items()
    }
    times = {
        name: {
            kind: median(each[name].get(kind, 0.0) for each in rounds) for kind in (*KINDS, OTHER)
        }
        for name in models
    }
    totals = {name: sum(kinds.values()) for name, kinds in times.items()}
    saved = times["dense"]["matmuls"] * (1 - flops["low_rank"] / flops["dense"])
    return {
        "environment": environment(),
        "settings": {"tokens": args.tokens, "dtype": dtype, "rounds": args.rounds}
        | {"width": shape.width, "layers": shape.num_layers},
        "ms": times,
        "total_ms": totals,
        "ratio": totals["dense"] / totals["low_rank"],
        "flop_ratio": flops["dense"] / flops["low_rank"],
        "matmul_ratio": times["dense"]["matmuls"] / times["low_rank"]["matmuls"],
        "allowed": totals["dense"] / (totals["dense"] - saved),
    }


def by_kind(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    return spent


def kind_of(name: str) -> str:
    """The kind of an operation by its name."""
    for kind, parts in KINDS.items():
        if any(part in name.lower() for part in parts):
            return kind
    return OTHER


if __name__ == "__main__":
    main()

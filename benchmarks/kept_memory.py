"""What keeping freed memory wins, and what it costs in memory: the same training, with and without.

Processes take turns, since malloc cannot be set back. Each builds a GPT, trains a few steps alone,
and reports the median step and the largest size that it ever had.

    python benchmarks/kept_memory.py --output reports/speed/records/kept_memory.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _publish import publish

from factorlm.bench import BenchOptions
from factorlm.bench.model import ModelShape, training_step
from factorlm.measure import environment
from factorlm.memory import keep_freed_memory

STRUCTURE = "low_rank"


def measure_once(args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step and the peak resident MiB of this process."""
    if args.child == "kept":
        keep_freed_memory()
    torch.manual_seed(0)
    shape = ModelShape(width=args.width, num_layers=args.layers)
    model = shape.build(STRUCTURE, BenchOptions())
    step = training_step(model, args.tokens // shape.context_length, shape, args.dtype)
    step(), step()
    times = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step_ms": statistics.median(times), "peak_mib": peak}


def run_child(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """``measure_once`` in a process of its own."""
    passed = [f"--{name}={getattr(args, name)}" for name in SIZES]
    command = [sys.executable, __file__, f"--child={mode}", *passed]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


SIZES = ("width", "layers", "tokens", "dtype", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="a step (default: 4096)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=5, help="timed in a process (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (default: 5)")
    parser.add_argument("--output", type=Path, help="append the result to it")
    parser.add_argument("--child", choices=("kept", "default"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure_once(args)))
        return
    found: dict[str, list[dict[str, Any]]] = {"default": [], "kept": []}
    for _ in range(args.rounds):
        for mode, results in found.items():
            results.append(run_child(args, mode))
    ratios = [
        kept["step_ms"] / default["step_ms"]
        for kept, default in zip(found["kept"], found["default"], strict=True)
    ]
    result = {
        "benchmark": "kept_memory",
        "settings": {name: getattr(args, name) for name in SIZES} | {"structure": STRUCTURE},
        "environment": environment(),
        "cases": found,
        "kept_over_default": statistics.median(ratios),
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()

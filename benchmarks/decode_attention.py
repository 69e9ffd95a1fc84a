"""Attention of one token over a cache on a CPU: two batched products against SDPA.

``FEWEST_PRODUCTS`` and ``MOST_VALUES`` of ``factorlm.inference.attention`` are taken from this.
Keys and values are parts of a longer cache, as in decoding; outputs are compared first.

    python benchmarks/decode_attention.py --output reports/speed/decode_attention.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _publish import publish
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from factorlm.inference.attention import attend_one
from factorlm.measure import environment, measure_latency
from factorlm.memory import keep_freed_memory

WIDTH = 64
"""Of a head."""
TOLERANCE = 0.02


def inputs(batch: int, heads: int, groups: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Query (batch, heads, 1, WIDTH), keys and values (batch, groups, length, WIDTH)."""
    query = torch.randn(batch, 1, heads, WIDTH, dtype=dtype).transpose(1, 2)
    caches = [torch.randn(batch, groups, length + 64, WIDTH, dtype=dtype) for _ in range(2)]
    return [query, *(cache[:, :, :length] for cache in caches)]


@torch.no_grad()
def measure(
    batch: int, heads: int, groups: int, length: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Median microseconds of both, which take turns."""
    query, key, value = inputs(batch, heads, groups, length, dtype)
    module = nn.Module()
    module.num_key_value_groups = heads // groups
    cases = {
        "sdpa": lambda: sdpa_attention_forward(module, query, key, value, None)[0],
        "products": lambda: attend_one(query, key, value, None, None),
    }
    error = float((cases["products"]() - cases["sdpa"]()).abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"outputs differ by {error:.2g}, over {TOLERANCE:g}")
    found = measure_latency(cases, rounds=rounds, min_round_ms=5.0)
    return {
        "batch": batch,
        "heads": heads,
        "key_heads": groups,
        "length": length,
        "key_values": key.numel(),
        "us": {name: round(1000 * one.median_ms, 1) for name, one in found.items()},
        "products_over_sdpa": round(found["products"].ratio_to(found["sdpa"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 256, 1024, 2048])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="append the result to it")
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    settings = [
        (batch, args.heads, groups, length)
        for batch in args.batches
        for groups in (args.heads, args.heads // 4)
        for length in args.lengths
    ]
    result = {
        "benchmark": "decode_attention",
        "environment": environment(),
        "dtype": "bf16",
        "cases": [measure(*one, torch.bfloat16, args.rounds) for one in settings],
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()

"""A dense training step of ours against nanoGPT's model and step, alternating in one process.

Width 256, 6 layers, context 256: nanoGPT's model with its own optimizer, and our dense GPT (RoPE in
place of learned positions) with ours; each step is forward, backward, clipping and AdamW on the
same tokens. Bars: in float32 at most 1.03x its time; with bf16 autocast at most 0.60x.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt_step.py --nanogpt nanoGPT --output reports/speed/records/nanogpt.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from factorlm.bench import Bar, BenchmarkCase, BenchOptions, measure_cases
from factorlm.bench.model import ModelShape, training_step
from factorlm.measure import has_fast_bf16
from factorlm.records import BenchmarkRecord, RecordFile
from factorlm.report.benchmarks import bar_line, benchmark_table, benchmark_title

SHAPE = ModelShape(width=256, num_layers=6, vocab_size=4096, context_length=256)
LIMITS = {"fp32": 1.03, "bf16": 0.60}


def nanogpt_step(folder: Path, rows: int) -> Callable[[], object]:
    """nanoGPT's model and optimizer, in float32, as its train.py steps them."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = GPTConfig(
        block_size=SHAPE.context_length,
        vocab_size=SHAPE.vocab_size,
        n_layer=SHAPE.num_layers,
        n_head=SHAPE.width // 64,
        n_embd=SHAPE.width,
        dropout=0.0,
        bias=True,
    )
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    ids = torch.randint(SHAPE.vocab_size, (rows, SHAPE.context_length + 1))

    def run() -> None:
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure(args: argparse.Namespace) -> BenchmarkRecord:
    dtypes = [name for name in LIMITS if name == "fp32" or has_fast_bf16("cpu")]
    options = BenchOptions(rounds=args.rounds)
    cases = {"nanoGPT fp32": BenchmarkCase(run=nanogpt_step(args.nanogpt, args.rows))}
    for dtype in dtypes:
        step = training_step(SHAPE.build(None, options), args.rows, SHAPE, dtype)
        cases[f"factorlm {dtype}"] = BenchmarkCase(run=step)
    return measure_cases(
        "nanogpt_step",
        SHAPE.to_dict() | {"num_tokens": args.rows * SHAPE.context_length},
        cases,
        device=torch.device("cpu"),
        rounds=args.rounds,
        baseline="nanoGPT fp32",
        min_round_ms=1.0,
        bars=lambda times: [
            Bar(
                name=f"factorlm {dtype} / nanoGPT fp32",
                value=times.ratio(f"factorlm {dtype}", "nanoGPT fp32"),
                limit=LIMITS[dtype],
            )
            for dtype in dtypes
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--rows", type=int, default=16, help="sequences a step (default: 16)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="append the record to it")
    args = parser.parse_args()
    record = measure(args)
    print(benchmark_title(record))
    print(benchmark_table(record).plain())
    for bar in record.bars:
        print(bar_line(bar))
    if args.output is not None:
        RecordFile(args.output).append(record)


if __name__ == "__main__":
    main()

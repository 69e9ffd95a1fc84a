"""``factorlm bench``: how fast the parts are here, each beside what is promised of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorlm.config import check

if TYPE_CHECKING:
    from factorlm.bench import BenchOptions
    from factorlm.records import BenchmarkRecord

HELP = "time layers and models on this machine, beside what is promised of them"
KEEPS_MEMORY = True
EPILOG = """\
benchmarks:
  kernel      one linear layer, each structure beside dense and beside its bare matmuls
  ffn         a whole FFN: up, GELU, down, with biases
  premerge    one linear layer in use, few tokens to many: tuned, with its merged copy where that
              is faster, beside dense
  model       a training step of a GPT whose first FFN is dense
  decode      greedy generation of such a GPT, beside generate of Hugging Face
  throughput  the most tokens a second: each model at its best batch size, with and without
              grouped queries, at a generation length of 256 unless --new-tokens says otherwise

Cases take turns, so that what drifts meets all of them; medians and quartiles over --rounds.
Results are compared with a dense product in float64 before anything is timed. A bar is a promise
of the project: it is printed beside the figure, and with --strict a missed one exits 1. Time
nothing while another job runs.

examples:
  factorlm bench kernel
  factorlm bench kernel --shapes 1024x4096 --tokens 1 16 256 4096 --plot latency.png
  factorlm bench premerge --shapes 1024x4096 --tokens 1 2 4 8 64 512 --rounds 50
  factorlm bench ffn --structures low_rank --output reports/speed/records/ffn.jsonl
  factorlm bench model --tokens 8192 --structures low_rank --rounds 5
  factorlm bench decode --width 1024 --structures low_rank --batch-sizes 1 8
"""
BENCHMARKS = ("kernel", "ffn", "premerge", "model", "decode", "throughput")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("benchmark", choices=BENCHMARKS, help="what to time")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="IxO",
        help="inputs x outputs of a linear (default: 768x3072 2048x8192)",
    )
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="(default: 4096)")
    parser.add_argument("--width", type=int, default=768, help="of a model (default: 768)")
    parser.add_argument("--layers", type=int, default=12, help="of a model (default: 12)")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, metavar="B", help="of decode (default: 1 8)"
    )
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of decode (default: 64)")
    parser.add_argument("--structures", nargs="+", metavar="NAME", help="(default: all three)")
    parser.add_argument(
        "--share",
        type=float,
        help="of the dense weights (default: 0.3125, the papers' 32 %%)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        help="fp32, bf16, fp16 (default: fp32, and bf16 where the device computes in it)",
    )
    parser.add_argument(
        "--passes", nargs="+", metavar="PASS", help="forward, forward+backward (default: both)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--rounds", type=int, metavar="N", help="of all cases (default: 15)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the records to it")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw latency and speed-up against the tokens or widths: .png, .svg or .pdf",
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 where a bar is missed")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print a table for each setting as it is measured."""
    from factorlm.measure import has_fast_bf16
    from factorlm.records import RecordFile
    from factorlm.report.benchmarks import bar_line, benchmark_table, benchmark_title, is_met
    from factorlm.report.speed import plot_speed

    options = _options(args)
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        check(path is None or path.parent.is_dir(), f"{flag} {path}: no such folder")
    if not options.dtypes and not has_fast_bf16(options.device.partition(":")[0]):
        print("bf16 left out: this device does not compute in it", file=sys.stderr)
    missed, records = 0, []
    for record in _records(args, options):
        print(benchmark_title(record))
        print(benchmark_table(record).plain())
        for bar in record.bars:
            print(bar_line(bar))
            missed += not is_met(bar)
        print(flush=True)
        if args.output is not None:
            RecordFile(args.output).append(record)
        records.append(record)
    if args.plot is not None:
        plot_speed(records, args.plot)
    return 1 if missed and args.strict else 0


def _records(args: argparse.Namespace, options: BenchOptions) -> Iterator[BenchmarkRecord]:
    from factorlm.bench.decode import DecodeOptions, benchmark_decode
    from factorlm.bench.ffn import benchmark_ffn
    from factorlm.bench.kernel import benchmark_kernel
    from factorlm.bench.model import ModelShape, benchmark_model
    from factorlm.bench.premerge import benchmark_premerge
    from factorlm.bench.throughput import benchmark_throughput

    if args.benchmark == "kernel":
        return benchmark_kernel(options)
    if args.benchmark == "ffn":
        return benchmark_ffn(options)
    if args.benchmark == "premerge":
        return benchmark_premerge(options)
    is_throughput = args.benchmark == "throughput"
    decode = DecodeOptions(
        batch_sizes=tuple(args.batch_sizes or (1, 8)),
        num_new_tokens=args.new_tokens or (256 if is_throughput else 64),
    )
    length = decode.num_prompt_tokens + decode.num_new_tokens
    shape = ModelShape(width=args.width, num_layers=args.layers, context_length=max(256, length))
    if args.benchmark == "model":
        return benchmark_model(options, shape)
    run = benchmark_throughput if is_throughput else benchmark_decode
    return run(options, shape, decode)


def _options(args: argparse.Namespace) -> BenchOptions:
    """The arguments that were given; the rest have the options' own defaults."""
    from factorlm.bench import BenchOptions
    from factorlm.cli._model import find_device

    given = {
        "shapes": args.shapes,
        "num_tokens": args.tokens,
        "structures": args.structures,
        "share": args.share,
        "dtypes": args.dtypes,
        "passes": args.passes,
        "rounds": args.rounds,
    }
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in given.items()
        if value is not None
    }
    return BenchOptions(device=str(find_device(args.device)), **chosen)


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} must be inputs x outputs, such as 768x3072")
    return int(sizes[0]), int(sizes[1])

"""``factorlm bench``: how fast the parts are here, each beside what is promised of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorlm.config import check

if TYPE_CHECKING:
    from factorlm.bench import BenchOptions
    from factorlm.bench.decode import DecodeOptions
    from factorlm.records import BenchmarkRecord

HELP = "time layers and models on this machine, beside what is promised of them"
KEEPS_MEMORY = True
EPILOG = """\
benchmarks:
  kernel      one linear layer: dense, each structure and its bare matmuls, and with
              --tokens 16384 a self-guided training step
  ffn         a whole FFN, up, GELU, down, with biases, beside its parts; --gated: SwiGLU
  premerge    one linear layer in use, few tokens to many: tuned, with its merged copy where that
              is faster, beside dense; on CUDA as graphs
  model       a training step of a GPT whose first FFN is dense
  decode      greedy generation of such a GPT, beside generate of Hugging Face
  throughput  the most tokens a second: each model at its best batch size, with and without
              grouped queries

Cases take turns, so that what drifts meets all of them; medians and quartiles over --rounds.
Results are compared with dense products before anything is timed. A bar is a promise of the
project: it is printed beside the figure, and with --strict a missed one exits 1. Time nothing while
another job runs. block_shuffle is timed without its last shuffle (output_shuffle: false).

examples:
  factorlm bench kernel
  factorlm bench kernel --shapes 1024x4096 --tokens 1 16 256 4096 --plot latency.png
  factorlm bench kernel --shapes 768x3072 --tokens 16384 --structures low_rank --rounds 5
  factorlm bench ffn --structures low_rank --output reports/speed/records/ffn.jsonl
  factorlm bench ffn --device cuda --shapes 5120x20480 --tokens 30000 --passes forward
  factorlm bench premerge --shapes 1024x4096 --tokens 1 2 4 8 64 512
  factorlm bench premerge --device cuda --shapes 2048x8192 5120x20480 --tokens 1 4 16 64
  factorlm bench model --structures low_rank --share 0.3125 0.625
  factorlm bench decode --width 512 1024 --structures low_rank --batch-sizes 1 8
  factorlm bench throughput --structures low_rank --dtypes bf16
"""
LAYERS, MODELS = ("kernel", "ffn", "premerge"), ("model", "decode", "throughput")
BENCHMARKS = LAYERS + MODELS
CONCERNS: Mapping[str, tuple[str, ...]] = {
    "shapes": LAYERS,
    "tokens": (*LAYERS, "model"),
    "passes": ("kernel", "ffn"),
    "gated": ("ffn",),
    "compiled": ("ffn", "model"),
    "width": MODELS,
    "layers": MODELS,
    "batch_sizes": ("decode",),
    "new_tokens": ("decode", "throughput"),
    "plot": (*LAYERS, "model"),
    "strict": (*LAYERS, "model", "decode"),
}
"""The benchmarks that a flag concerns; others refuse it. Flags that are not here concern all."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "premerge": {
        "shapes": [(512, 2048), (1024, 4096), (2048, 8192)],
        "tokens": [2**power for power in range(14)],
        "rounds": 50,
    },
    "model": {"tokens": [8192], "width": [768], "rounds": 5},
    "decode": {"width": [1024], "new_tokens": 64},
    "throughput": {"width": [1024], "new_tokens": 256, "rounds": 3},
}
"""What a benchmark's bars are set for, where that is not ``BenchOptions``'s own default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("benchmark", choices=BENCHMARKS, help="what to time")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="IxO",
        help="inputs x outputs of a linear (kernel, ffn: 768x3072 2048x8192; premerge: 512x2048 "
        "1024x4096 2048x8192)",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="of a call or step (kernel, ffn: 4096; premerge: 1 2 4 ... 8192; model: 8192)",
    )
    parser.add_argument(
        "--width",
        nargs="+",
        type=int,
        metavar="N",
        help="of a model (model: 768; decode, throughput: 1024)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of a model (default: 12)")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, metavar="B", help="of decode (default: 1 8)"
    )
    parser.add_argument(
        "--new-tokens", type=int, metavar="N", help="to generate (decode: 64; throughput: 256)"
    )
    parser.add_argument("--structures", nargs="+", metavar="NAME", help="(default: all three)")
    parser.add_argument(
        "--share",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="of the dense weights (default: 0.3125, the papers' 32 %%)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        help="fp32, bf16, fp16 (default: fp32, and bf16 where the device computes in it)",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        metavar="PASS",
        help="of kernel and ffn: forward, forward+backward (default: both)",
    )
    parser.add_argument("--gated", action="store_true", help="of ffn: SwiGLU without biases")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="of ffn and model: each also compiled (ffn: dense, low_rank)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="of all cases (kernel, ffn, decode: 15; premerge: 50; model: 5; throughput: 3)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the records to it")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw latency and speed-up against the tokens or widths, not for decode and "
        "throughput: .png, .svg or .pdf",
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 where a bar is missed")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print a table for each setting as it is measured."""
    from factorlm.records import RecordFile
    from factorlm.report.benchmarks import is_met
    from factorlm.report.speed import plot_speed

    _refuse_and_fill(args)
    options = _options(args)
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        check(path is None or path.parent.is_dir(), f"{flag} {path}: no such folder")
    several = args.plot is not None and len(options) > 1
    check(not several, f"--plot {args.plot}: only one --share can be drawn")
    _say_what_is_left_out(args, options[0])
    records = []
    for record in _records(args, options):
        _print(record)
        if args.output is not None:
            RecordFile(args.output).append(record)
        records.append(record)
    if args.plot is not None:
        plot_speed(records, args.plot)
    missed = any(not is_met(bar) for record in records for bar in record.bars)
    return 1 if missed and args.strict else 0


def _print(record: BenchmarkRecord) -> None:
    from factorlm.report.benchmarks import bar_line, benchmark_table, benchmark_title

    print(benchmark_title(record))
    print(benchmark_table(record).plain())
    for bar in record.bars:
        print(bar_line(bar))
    print(flush=True)


def _refuse_and_fill(args: argparse.Namespace) -> None:
    """Refuse flags that do not concern the benchmark, and give it its own defaults."""
    for name, benchmarks in CONCERNS.items():
        flag = f"--{name.replace('_', '-')}"
        check(
            args.benchmark in benchmarks or getattr(args, name) in (None, False),
            f"{flag} does not concern bench {args.benchmark}, only {', '.join(benchmarks)}",
        )
    for name, value in DEFAULTS.get(args.benchmark, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _say_what_is_left_out(args: argparse.Namespace, options: BenchOptions) -> None:
    from factorlm.bench.kernel import GUIDED_TOKENS
    from factorlm.measure import has_fast_bf16

    if not options.dtypes and not has_fast_bf16(options.device.partition(":")[0]):
        print("bf16 left out: this device does not compute in it", file=sys.stderr)
    few = max(options.num_tokens) < GUIDED_TOKENS
    if args.benchmark == "kernel" and "low_rank" in options.structures and few:
        print(
            f"self-guided step left out: add --tokens {GUIDED_TOKENS} --shapes 768x3072",
            file=sys.stderr,
        )


def _records(args: argparse.Namespace, options: list[BenchOptions]) -> Iterator[BenchmarkRecord]:
    """Of every share and, for models, width."""
    if args.benchmark in LAYERS:
        for one in options:
            yield from _layer_records(args.benchmark, one)
    else:
        yield from _model_records(args, options)


def _layer_records(benchmark: str, options: BenchOptions) -> Iterator[BenchmarkRecord]:
    from factorlm.bench.ffn import benchmark_ffn
    from factorlm.bench.kernel import benchmark_kernel
    from factorlm.bench.premerge import benchmark_premerge

    runs = {"kernel": benchmark_kernel, "ffn": benchmark_ffn, "premerge": benchmark_premerge}
    return runs[benchmark](options)


def _model_records(
    args: argparse.Namespace, options: list[BenchOptions]
) -> Iterator[BenchmarkRecord]:
    from factorlm.bench.decode import benchmark_decode
    from factorlm.bench.model import ModelShape, benchmark_model
    from factorlm.bench.throughput import benchmark_throughput

    decode = _decode_options(args)
    length = max(256, decode.num_prompt_tokens + decode.num_new_tokens)
    chosen = {} if args.layers is None else {"num_layers": args.layers}
    shapes = [ModelShape(width=width, context_length=length, **chosen) for width in args.width]
    for one in options:
        for shape in shapes:
            if args.benchmark == "model":
                yield from benchmark_model(one, shape)
            elif args.benchmark == "decode":
                yield from benchmark_decode(one, shape, decode)
            else:
                yield from benchmark_throughput(one, shape, decode, _tell)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _decode_options(args: argparse.Namespace) -> DecodeOptions:
    from factorlm.bench.decode import DecodeOptions

    given = {"batch_sizes": args.batch_sizes, "num_new_tokens": args.new_tokens}
    return DecodeOptions(**_given(given))


def _options(args: argparse.Namespace) -> list[BenchOptions]:
    """Those of each share. What was not given has the options' own default."""
    from factorlm.bench import BenchOptions
    from factorlm.cli._model import find_device

    given = {
        "shapes": args.shapes,
        "num_tokens": args.tokens,
        "structures": args.structures,
        "dtypes": args.dtypes,
        "passes": args.passes,
        "rounds": args.rounds,
        "gated": args.gated,
        "compiled": args.compiled,
    }
    options = BenchOptions(device=str(find_device(args.device)), **_given(given))
    return [options.replace(share=share) for share in args.share or (options.share,)]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are there, lists as tuples."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if value is not None
    }


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} must be inputs x outputs, such as 768x3072")
    return int(sizes[0]), int(sizes[1])

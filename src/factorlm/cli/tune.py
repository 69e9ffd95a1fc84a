"""``factorlm tune``: when a model's merged weights are faster than its factors, here."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from factorlm.cli._model import add_model_arguments, open_model
from factorlm.config import check

if TYPE_CHECKING:
    from rich.table import Table

    from factorlm.inference import LatencyTable, LayerCase

HELP = "measure when a model's merged weights are faster than its factors on this machine"
KEEPS_MEMORY = True
EPILOG = """\
Every distinct structured layer is timed with 1, 2, 4, ... tokens at a time, by its factors and by
its dense weight, which take turns. The tables are kept for this device, dtype and number of
threads, where premerge_ finds them: in $FACTORLM_CACHE, else $XDG_CACHE_HOME/factorlm, else
~/.cache/factorlm. Measure on a machine that does nothing else.

examples:
  factorlm tune runs/demo_low_rank
  factorlm tune runs/demo_low_rank --dtype bfloat16 --max-tokens 512
  factorlm tune models/mine --device cuda --json
"""
MAX_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help=f"measure with no more tokens than this (default: {MAX_TOKENS})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, units in its keys")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Measure, keep the tables, print them."""
    from factorlm.inference import tune

    check(args.max_tokens >= 1, f"--max-tokens {args.max_tokens} must be at least 1")
    model = open_model(args)
    with _progress() as on_progress:
        tables = tune(model, max_tokens=args.max_tokens, on_progress=on_progress)
    if args.json:
        print(json.dumps([_plain(case, table) for case, table in tables.items()], indent=2))
    else:
        _print(tables)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _plain(case: LayerCase, table: LatencyTable) -> dict[str, object]:
    rows = [dataclasses.asdict(row) | {"merges": row.merges} for row in table.rows]
    return case.key() | {"copy_bytes": case.copy_bytes, "rows": rows}


def _print(tables: Mapping[LayerCase, LatencyTable]) -> None:
    from rich.console import Console

    from factorlm.inference.latency import table_path

    console = Console()
    for case, table in tables.items():
        console.print(_table(case, table))
    folder = table_path(next(iter(tables))).parent
    console.print(f"kept in {folder}", highlight=False, soft_wrap=True)


def _table(case: LayerCase, table: LatencyTable) -> Table:
    from rich.table import Table

    printed = Table("tokens", title=f"{case} on {case.device_name}", title_justify="left")
    for name in ("factors, ms", "merged, ms", "noise, ms", "faster"):
        printed.add_column(name, justify="right")
    for row in table.rows:
        times = (row.structured_ms, row.merged_ms, row.noise_ms)
        faster = "merged" if row.merges else "factors"
        printed.add_row(f"{row.num_tokens:,}", *(f"{time:.4g}" for time in times), faster)
    return printed

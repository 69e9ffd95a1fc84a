"""``factorlm compare``: runs side by side, from their records alone."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from factorlm.config import check
from factorlm.errors import ConfigError

if TYPE_CHECKING:
    from factorlm.report import RunSummary

HELP = "compare training runs: a table, their loss curves and what was monitored as pictures"
EPILOG = """\
Reads records only, so it works while a run is going on, without PyTorch, and on copies of
records.jsonl. Columns after the first run say what a run is relative to the first. Beside the
picture of the losses, curves.png, curves_monitors.png shows what was monitored in structured
layers: spectral norms of factors, how much each step changes their product, the guide's share.

examples:
  factorlm compare runs/demo_dense runs/demo_low_rank
  factorlm compare runs/* --plot curves.svg
  factorlm compare runs/a runs/b --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="run", help="a run's folder, or a file of records"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, units in its keys")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="where the curves go: .png, .svg or .pdf (default: compare.png beside the first run; "
        "none with --json)",
    )
    picture.add_argument("--no-plot", action="store_true", help="draw no curves")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print the comparison and draw the curves."""
    from factorlm.report import read_runs
    from factorlm.report.figures import SUFFIXES

    # ``runs/*`` finds the picture of an earlier comparison too.
    paths = [path for path in args.runs if path.suffix not in SUFFIXES]
    check(bool(paths), "name at least one run")
    runs = read_runs(paths)
    _print(args, runs)
    if args.plot is not None:
        _plot(runs, args.plot)
    elif not args.no_plot and not args.json:
        try:
            _plot(runs, paths[0].resolve().parent / "compare.png")
        except ConfigError as error:
            print(f"no curves: {error}", file=sys.stderr)
    return 0


def _print(args: argparse.Namespace, runs: list[RunSummary]) -> None:
    from factorlm.report import (
        comparison_json,
        comparison_notes,
        comparison_table,
        comparison_tables,
    )

    if args.json:
        print(json.dumps(comparison_json(runs), indent=2))
        return
    if args.markdown:
        print(comparison_table(runs).markdown())
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n\n".join(table.plain() for table in comparison_tables(runs, width)))
    for note in comparison_notes(runs):
        print(note)


def _plot(runs: list[RunSummary], path: Path) -> None:
    from factorlm.report import plot_losses, plot_monitors

    print(f"loss curves: {plot_losses(runs, path)}", file=sys.stderr)
    if any(run.monitors for run in runs):
        beside = path.with_name(f"{path.stem}_monitors{path.suffix}")
        print(f"monitors: {plot_monitors(runs, beside)}", file=sys.stderr)

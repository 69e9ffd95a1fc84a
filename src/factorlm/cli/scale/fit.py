"""``factorlm scale fit``: scaling laws of runs, from their records alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from factorlm.cli.scale._output import add_output_arguments, print_and_plot

HELP = "fit scaling laws to runs and compare their families, with intervals"
EPILOG = """\
Reads records only, so it works without PyTorch, on copies of them. A folder is searched for *.jsonl
at any depth. Runs of a ladder name their family and size themselves; other runs are of one family
where they differ in size, data and seed alone. A point is the loss of the last evaluation of a
finished run at its training FLOPs, the head included; seeds are points of their own.

Straight lines in log–log, laws that share one entropy E, slope differences with what they come
from, FLOPs for equal loss, crossings and a held-out check are printed with intervals, and in plain
words what the points cannot tell. Where sizes are trained for several numbers of tokens each, so is
a law of parameters and tokens, with the best of both for a budget.

examples:
  factorlm scale fit runs/books -o figures
  factorlm scale fit reports/ladder/records --base dense --markdown
  factorlm scale fit runs/iso_flops --budget 1e15 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="run",
        help="a run's folder, a file of records, or a folder that holds such",
    )
    parser.add_argument(
        "--count",
        choices=("executed_flops", "model_flops"),
        help="FLOPs as run, or by the papers' convention (default: as run, where all recorded it)",
    )
    parser.add_argument(
        "--base",
        metavar="FAMILY",
        help="what families are compared with (default: dense, else the first)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="FLOPS",
        help="training FLOPs to find the best size and tokens for (default: the most of a run)",
    )
    add_output_arguments(parser, folder="fits")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print the tables and draw the figures."""
    from factorlm.report import fit_study, fits_json, fits_text, gather, plot_fits, study_of

    report = gather(args.paths)
    for reason in report.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    study = study_of(report.runs, args.count)
    fits = fit_study(study, base=args.base, level=args.level, budget=args.budget)
    print_and_plot(
        args,
        text=lambda is_markdown: fits_text(fits, is_markdown=is_markdown),
        values=lambda: fits_json(fits),
        plot=lambda folder: plot_fits(fits, folder),
    )
    return 0

"""``factorlm report``: runs and benchmarks as a page, pictures and tables, from records alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factorlm.report import Report

HELP = "make a page of runs and benchmarks: one HTML file that needs no network"
EPILOG = """\
Reads records only, so it works without PyTorch, on copies of them, and while runs are going on. A
folder is searched for *.jsonl at any depth; what cannot be used there is left out and named, here
and on the page. A run or file that is named itself has to be good.

The page has the runs with their exact numbers, loss curves over tokens, FLOPs and time, loss
against FLOPs by family with fitted laws and their bands where a family has three sizes, benchmarks,
monitors, what differs between the runs, and how to make each again.
Without -o, --figures and --markdown it is report.html.

examples:
  factorlm report runs -o report.html
  factorlm report runs/demo_dense runs/demo_low_rank_32
  factorlm report reports/quality/records --figures figures
  factorlm report reports/demo/records --markdown
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
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page: .html")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="write its charts as .png and .svg, for papers"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print its tables as Markdown, for READMEs"
    )


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Gather the records once, then write what was asked for."""
    from factorlm.report import (
        gather,
        report_fits,
        report_markdown,
        write_figures,
        write_page,
    )
    from factorlm.report.page import check_page_name

    if args.output is None and args.figures is None and not args.markdown:
        args.output = Path("report.html")
    if args.output is not None:
        check_page_name(args.output)
    report = gather(args.paths)
    for reason in report.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    fits = report_fits(report)
    if args.output is not None:
        print(_said(report, write_page(report, args.output, fits)), file=sys.stderr)
    if args.figures is not None:
        for line in write_figures(report, args.figures, fits):
            print(line, file=sys.stderr)
    if args.markdown:
        print(report_markdown(report, fits))
    return 0


def _said(report: Report, page: Path) -> str:
    from factorlm.report.page import title_of

    size = page.stat().st_size / 1e6
    return f"{page}: {title_of(report)} ({size:.1f} MB)"

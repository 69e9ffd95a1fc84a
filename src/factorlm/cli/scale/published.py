"""``factorlm scale published``: what the papers' points support, from the points."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from factorlm.errors import ConfigError

HELP = "redraw the papers' scaling figures and test what they claim"
EPILOG = """\
The points of arXiv 2407.09835 and 2406.16450 come with factorlm as records, each with a mark of how
certain it is. This fits straight lines and laws with a shared entropy E to them, tests whether
structured models scale more steeply than dense ones, and puts self-guided training beside its
control of more tokens at equal FLOPs. It needs neither PyTorch nor a network.

examples:
  factorlm scale published -o figures
  factorlm scale published --markdown --level 0.9
  factorlm scale published --no-plot --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, units in its keys")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument(
        "--level",
        type=float,
        default=0.95,
        metavar="P",
        help="probability of the intervals (default: 0.95)",
    )
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the figures go, as .png and .svg (default: published; none with --json)",
    )
    picture.add_argument("--no-plot", action="store_true", help="draw no figures")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print the tables and draw the figures."""
    from factorlm.report.published import published_json, published_text

    if args.json:
        print(json.dumps(published_json(args.level), indent=2))
    else:
        print(published_text(args.level, is_markdown=args.markdown))
    if args.output is not None:
        _plot(args.output, args.level)
    elif not args.no_plot and not args.json:
        try:
            _plot(Path("published"), args.level)
        except ConfigError as error:
            print(f"no figures: {error}", file=sys.stderr)
    return 0


def _plot(folder: Path, level: float) -> None:
    from factorlm.report.published import plot_published

    for path in plot_published(folder, level):
        print(f"figure: {path}", file=sys.stderr)

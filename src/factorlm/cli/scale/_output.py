"""How the commands that fit print and draw what they found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from factorlm.errors import ConfigError


def add_output_arguments(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """``--json``, ``--markdown``, ``--level``, ``-o``, ``--no-plot``; figures go to ``folder``."""
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
        help=f"where the figures go, as .png and .svg (default: {folder}; none with --json)",
    )
    picture.add_argument("--no-plot", action="store_true", help="draw no figures")
    parser.set_defaults(default_folder=Path(folder))


def print_and_plot(
    args: argparse.Namespace,
    *,
    text: Callable[[bool], str],
    values: Callable[[], dict[str, Any]],
    plot: Callable[[Path], Sequence[Path]],
) -> None:
    """Print ``values()`` as JSON or ``text(is_markdown)``, then ``plot`` into the folder.

    Where nobody asked for figures and matplotlib is missing, it is said and no error.
    """
    print(json.dumps(values(), indent=2) if args.json else text(args.markdown))
    if args.output is not None:
        _plot(plot, args.output)
    elif not args.no_plot and not args.json:
        try:
            _plot(plot, args.default_folder)
        except ConfigError as error:
            print(f"no figures: {error}", file=sys.stderr)


def _plot(plot: Callable[[Path], Sequence[Path]], folder: Path) -> None:
    for path in plot(folder):
        print(f"figure: {path}", file=sys.stderr)

"""``factorlm scale published``: what the papers' points support, from the points."""

from __future__ import annotations

import argparse

from factorlm.cli.scale._output import add_output_arguments, print_and_plot

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
    add_output_arguments(parser, folder="published")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print the tables and draw the figures."""
    from factorlm.report.published import plot_published, published_json, published_text

    print_and_plot(
        args,
        text=lambda is_markdown: published_text(args.level, is_markdown=is_markdown),
        values=lambda: published_json(args.level),
        plot=lambda folder: plot_published(folder, args.level),
    )
    return 0

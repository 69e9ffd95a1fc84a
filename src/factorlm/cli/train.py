"""``factorlm train``: run a recipe, or go on with it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from factorlm.cli._fields import fields_help

if TYPE_CHECKING:
    from factorlm.train.config import TrainConfig

HELP = "train a model from a recipe, or go on where it stopped"
KEEPS_MEMORY = True
TAKES_OVERRIDES = True
EPILOG = """\
examples:
  factorlm train recipes/demo_low_rank_32.yaml
  factorlm train recipes/demo_dense.yaml --name wider --model.overrides.intermediate_size 768
  factorlm train recipes/gpt_s_low_rank_32_2B.yaml --dry-run
  factorlm train recipes/demo_dense.yaml --name b --model.preset null --model.init_from runs/a
  factorlm train recipes/quality/low_rank_32.yaml --optimizer.kind spectron --name spectron
  factorlm train recipes/quality/low_rank_32_guided.yaml
  factorlm train recipes/quality/low_rank_32_guided.yaml --guide.variant none --name control
  torchrun --nproc-per-node 8 -m factorlm train recipes/papers/s_low_rank_32.yaml

The same command again resumes the run, bit for bit; a changed field is refused (exit code 3).
Ctrl-C saves a checkpoint and exits with code 75.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; recipe fields are overrides, listed in the epilog."""
    from factorlm.train.config import TrainConfig

    parser.epilog = (
        f"{EPILOG}\nRecipe fields, each also a flag --section.key value, its value as in YAML:\n\n"
        f"{fields_help(TrainConfig)}"
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; see docs/reference/recipes.md")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="default: runs")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what it costs, and stop"
    )


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Train; 0 when the run is finished."""
    from factorlm.train.recipe import load_recipe

    config = load_recipe(args.recipe, extra)
    if args.dry_run:
        return _dry_run(config)
    from factorlm.train.metrics import ProgressBar
    from factorlm.train.trainer import Trainer

    trainer = Trainer(config, runs_dir=args.runs_dir, callbacks=[ProgressBar()])
    result = trainer.fit()
    if result.already_finished and trainer.world.is_main:
        print(f"{result.path} is finished: {result.state.step} steps are done")
    return 0


def _dry_run(config: TrainConfig) -> int:
    from rich.console import Console

    from factorlm.cli.describe import print_description
    from factorlm.train.describe import describe
    from factorlm.train.facts import open_data

    print_description(describe(config), Console())
    open_data(config)
    return 0

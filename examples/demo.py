"""Train a dense and a low-rank model of the same shape on the same real text, and compare them.

The text is the source code of Python's own standard library, so nothing is downloaded:

    python examples/demo.py

Each step is a ``factorlm`` command that is printed before it runs; type it again, or change it,
afterwards. What is done already is not done again, so a demo that was stopped goes on. Arguments
change fields of both recipes: ``python examples/demo.py --batch.num_steps 100``.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from factorlm.cli.main import main as factorlm
from factorlm.train import TrainConfig, load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = (FOLDER / "demo_dense.yaml", FOLDER / "demo_low_rank_32.yaml")
PROMPT = "def main("
PICTURE = "runs/demo_loss.png"


def main(overrides: Sequence[str] = ()) -> None:
    """Prepare, train twice, generate, compare."""
    started = time.monotonic()
    configs = [load_recipe(recipe, overrides) for recipe in RECIPES]
    runs = [f"runs/{config.name}" for config in configs]

    say(f"1. Text to tokens: {', '.join(configs[0].data.source)}")
    prepare(configs[0])

    say("2. Train a dense model, and one whose FFN weights are low-rank")
    for recipe in RECIPES:
        run("train", os.path.relpath(recipe), *overrides)

    say("3. Let both write")
    for path in runs:
        run("generate", path, "--prompt", PROMPT, "--max-new-tokens", "100")

    say("4. Compare the two")
    run("compare", *runs, "--plot", PICTURE)

    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Models and records are in runs/. Go on with"
    )
    print(f'  .venv/bin/factorlm generate {runs[1]} --prompt "class "')
    print(f"  .venv/bin/factorlm eval {runs[1]} --text README.md")


def prepare(config: TrainConfig) -> None:
    """Write the recipe's token shards; says so if they are there."""
    data = config.data
    run("prepare", *data.source, "-o", data.path, "--tokenizer", data.tokenizer)


def say(text: str) -> None:
    """A heading."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def run(*words: str) -> None:
    """Run one ``factorlm`` command in this process; end with its exit code if it fails."""
    print(f"$ factorlm {shlex.join(words)}", flush=True)
    code = factorlm(words)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])

"""``factorlm eval``: the loss of a model on a text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorlm.cli._model import RunOfModel, add_model_arguments, find_run, open_model
from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.records import EvalRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from factorlm.data import TokenDataset
    from factorlm.eval import EvalResult

HELP = "measure a model's loss, perplexity and bits per byte on a text"
KEEPS_MEMORY = True
EPILOG = """\
Every non-overlapping window of the text counts, the last partial one too, so each token but the
first of a source is predicted once. Given a run, the numbers go into its records.

examples:
  factorlm eval runs/demo_low_rank
  factorlm eval runs/demo_low_rank --text notes.txt 'more/*.md'
  factorlm eval HuggingFaceTB/SmolLM2-135M --text python-stdlib --context-length 1024
  factorlm eval models/mine --data data/books --split validation --json
"""
DEFAULT_CONTEXT_LENGTH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--data", metavar="FOLDER", help="a prepared folder (default: the one of the run)"
    )
    text.add_argument(
        "--text",
        nargs="+",
        metavar="SOURCE",
        help="text files, folders, globs, hf:<dataset> or python-stdlib, as prepare takes them",
    )
    parser.add_argument("--split", help="of the prepared folder (default: validation)")
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="of --text in tables (default: text)"
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="L",
        help="tokens that one window predicts (default: the run's, else the model's, at most "
        f"{DEFAULT_CONTEXT_LENGTH})",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="windows at a time (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, units in its keys")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Evaluate, print, and add a record to the run."""
    from factorlm.eval import check_tokenizer, evaluate_model
    from factorlm.hf import model_folder

    check(args.split is None or args.text is None, f"--split {args.split}: only with --data")
    check(args.batch_size >= 1, f"--batch-size {args.batch_size} must be at least 1")
    found = find_run(args.model)
    source, split = _name_text(args, found)
    model, folder = open_model(args), model_folder(args.model)
    context_length = _context_length(args, found, model)
    with _open_text(args, source, folder) as dataset:
        check_tokenizer(model, folder, dataset)
        with _progress() as on_progress:
            result = evaluate_model(
                model,
                dataset,
                split,
                context_length=context_length,
                batch_size=args.batch_size,
                on_progress=on_progress,
            )
    label = source if args.text else f"{source} ({split})"
    _print(args, label, context_length, result)
    if found is not None:
        found.append(_record(found, folder, label, result))
    return 0


def _name_text(args: argparse.Namespace, found: RunOfModel | None) -> tuple[str, str]:
    """(what is evaluated, its split)."""
    if args.text:
        return ", ".join(args.text), "train"
    path = args.data
    if path is None and found is not None:
        path = found.record.config["data"]["path"]
    if path is None:
        raise ConfigError(f"{args.model} is not a run: name a text with --text, or --data")
    return path, args.split or "validation"


def _open_text(
    args: argparse.Namespace, source: str, folder: Path
) -> AbstractContextManager[TokenDataset]:
    from factorlm.data import open_dataset
    from factorlm.eval import prepared_text

    if args.text:
        return prepared_text(args.text, folder, text_column=args.text_column)
    return nullcontext(open_dataset(source))


def _context_length(
    args: argparse.Namespace, found: RunOfModel | None, model: PreTrainedModel
) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length: int | None = args.context_length
    if length is None and found is not None:
        length = found.record.config["data"]["context_length"]
    if length is None:
        return min(DEFAULT_CONTEXT_LENGTH, limit or DEFAULT_CONTEXT_LENGTH)
    check(length >= 1, f"--context-length {length} must be at least 1")
    rule = f"exceeds the model's max_position_embeddings={limit}"
    check(limit is None or length <= limit, f"--context-length {length} {rule}")
    return length


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print(args: argparse.Namespace, label: str, context_length: int, result: EvalResult) -> None:
    bits = result.bits_per_byte
    if args.json:
        values: dict[str, Any] = {
            "model": args.model,
            "source": label,
            "context_length": context_length,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": bits,
            "num_tokens": result.num_tokens,
            "seconds": result.seconds,
        }
        print(json.dumps(values, indent=2))
        return
    print(f"{args.model} on {label}")
    print(f"  loss           {result.loss:.4f} nats per token")
    print(f"  perplexity     {result.perplexity:.4g}")
    print(f"  bits per byte  {'unknown' if bits is None else f'{bits:.4f}'}")
    print(
        f"  tokens         {result.num_tokens:,} in windows of {context_length:,}, "
        f"{result.seconds:.1f} s"
    )


def _record(found: RunOfModel, folder: Path, label: str, result: EvalResult) -> EvalRecord:
    step, num_tokens = found.trained(best=folder.name == "model-best")
    return EvalRecord(
        step=step,
        num_tokens=num_tokens,
        source=label,
        loss=result.loss,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        num_eval_tokens=result.num_tokens,
        seconds=result.seconds,
    )

"""``factorlm prepare``: text to token shards."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from factorlm.data.dataset import TokenDataset
    from factorlm.data.preparation import OnProgress, PrepareProgress

HELP = "turn text into token shards for training"
EPILOG = """\
sources:
  notes.txt  books.md                one document a file
  data.jsonl  .jsonl.gz  .jsonl.zst  one document a line, its text under --text-column
  data.parquet                       one document a row, its text in --text-column
  folder  'folder/**/*.txt'          all such files below, or that match, by name
  hf:name[:config][:split]           a Hugging Face dataset, streamed (split: train)
  python-stdlib                      the sources of this Python's standard library

examples:
  factorlm prepare python-stdlib -o data/stdlib --tokenizer bpe:2048
  factorlm prepare shakespeare.txt -o data/shakespeare --tokenizer bytes --val-fraction 0.1
  factorlm prepare 'books/train-*.parquet' --val-source books/validation.parquet -o data/books
  factorlm prepare wiki/ code/ --weights 1 0.5 -o data/mixed --tokenizer bpe:32000
  factorlm prepare hf:HuggingFaceFW/fineweb-edu:sample-10BT -o data/fineweb --tokenizer gpt2

The same command goes on where it was stopped, to the same bytes with any number of workers.
Documents end with the tokenizer's end-of-text id; that token's name inside a text stays text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; what is left out keeps the default of ``PrepareConfig``."""
    parser.set_defaults(**dict.fromkeys(_FIELDS))
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="text to train on; see below")
    add("-o", "--output", required=True, metavar="DIR", help="folder for shards and tokenizer")
    add("--tokenizer", metavar="NAME", help=_TOKENIZER)
    add("--eos-token", metavar="TOKEN", help="ends documents (default: as the tokenizer says)")
    add("--val-fraction", type=float, metavar="F", help=_VAL_FRACTION)
    add("--val-source", action="append", dest="val_sources", metavar="SOURCE", help=_VAL_SOURCE)
    add("--weights", type=float, nargs="+", metavar="W", help=_WEIGHTS)
    add("--text-column", metavar="NAME", help="where the text is in a row (default: text)")
    add("--workers", type=int, metavar="N", help="processes (default: one a core, up to 16)")
    add("--shard-tokens", type=int, metavar="N", help="tokens in a shard (default: 67108864)")
    add("--seed", type=int, metavar="N", help="of the choice of validation documents (default: 0)")
    add("--tolerant", action="store_true", help=_TOLERANT)


_FIELDS = (
    "tokenizer", "eos_token", "val_fraction", "val_sources", "weights", "text_column", "workers",
    "shard_tokens", "seed",
)  # fmt: skip
_TOKENIZER = (
    "'bytes', 'bpe:<size>' to train one on this text, a tokenizer folder, or a Hugging Face name "
    "(default: bpe:4096)"
)
_VAL_FRACTION = (
    "share that validates: of the documents, or the tail of a source that is a single document "
    "(default: 0.1, or 0 with --val-source)"
)
_VAL_SOURCE = "text that validates, all of SOURCE then trains; may be given several times"
_WEIGHTS = "how many times an epoch goes over each source (default: 1 each)"
_TOLERANT = "leave out and count bad records, up to 0.1%% of all; otherwise the first one stops"


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Prepare, with a progress bar, and print what there is now."""
    from pathlib import Path

    from rich.console import Console

    from factorlm.data import PrepareConfig, prepare
    from factorlm.storage import MANIFEST_FILE

    given = {name: value for name, value in vars(args).items() if value is not None}
    config = PrepareConfig(**given)
    console = Console()
    was_finished = (Path(config.output) / MANIFEST_FILE).exists()
    with _progress(console) as on_progress:
        dataset = prepare(config, on_progress)
    if was_finished:
        console.print(
            f"{config.output} was prepared before, with these settings",
            highlight=False,
            soft_wrap=True,
        )
    _print_summary(dataset, console)
    return 0


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[OnProgress | None]:
    """A bar over the bytes of input, on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[done]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("reading", total=None, done="")

        def on_progress(state: PrepareProgress) -> None:
            text, tokens = state.num_text_bytes / 1e6, state.num_tokens / 1e6
            done = f"{text:,.1f} MB of text, {tokens:,.2f}M tokens"
            total, read = state.total_input_bytes, state.input_bytes
            progress.update(bar, description="encoding", total=total, completed=read, done=done)

        yield on_progress


def _print_summary(dataset: TokenDataset, console: Console) -> None:
    from rich.table import Table

    names = ("documents", "tokens", "bytes of text", "bytes per token", "shards")
    table = Table("split")
    for name in names:
        table.add_column(name, justify="right")
    for split in dataset.splits.values():
        if split.num_tokens:
            table.add_row(
                split.name,
                f"{split.num_documents:,}",
                f"{split.num_tokens:,}",
                f"{split.num_text_bytes:,}",
                f"{split.num_text_bytes / split.num_tokens:.3f}",
                f"{split.num_shards:,}",
            )
    console.print(table)
    facts = dataset.manifest.extra
    vocabulary = f"vocabulary {dataset.vocab_size:,}, stored as {dataset.dtype.name}"
    console.print(f"{dataset.path}: {vocabulary}", highlight=False, soft_wrap=True)
    left_out = {"empty": facts["num_empty_documents"], **facts["rejected"]}
    counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
    if counts:
        console.print(f"records left out: {counts}", highlight=False, soft_wrap=True)

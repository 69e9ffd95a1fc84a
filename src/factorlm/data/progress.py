"""What is durable of a preparation that runs, so that the next attempt goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from factorlm.data.dataset import TOKENIZER_FOLDER
from factorlm.data.planning import Cursor
from factorlm.data.shards import SHARD_FOLDER, StreamState
from factorlm.data.sources import Source
from factorlm.errors import ConfigError, DataError
from factorlm.storage import (
    fileops,
    read_sealed_json,
    remove_leftovers,
    storage_errors,
    write_sealed_json,
)

PROGRESS_FILE = "progress.json"


@dataclass
class Progress:
    """How far a preparation is; ``save`` makes it the state to go on from."""

    signature: dict[str, Any]
    """What decides the output: another signature cannot go on."""
    modified: str
    """A hash over the times of change of the input files."""
    cursor: Cursor = field(default_factory=Cursor)
    streams: dict[str, StreamState] = field(default_factory=dict)
    """By shard stem."""
    num_records: int = 0
    num_empty: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Bad records by reason, in alphabetical order."""
    num_text_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """Ids written, the ends of documents included."""
        return sum(stream.num_tokens for stream in self.streams.values())

    def reject(self, counts: Mapping[str, int]) -> None:
        """Add to the counts of bad records."""
        total = Counter(self.rejected) + Counter(counts)
        self.rejected = dict(sorted(total.items()))

    def save(self, folder: Path) -> None:
        """Write ``progress.json``; the shards must be durable."""
        write_sealed_json(folder / PROGRESS_FILE, asdict(self))


def start_or_resume(folder: Path, signature: dict[str, Any], modified: str) -> Progress:
    """Read ``progress.json`` and drop what is not covered by it, or start a new one, as long as
    there is no tokenizer: a tokenizer that could not be made may be corrected.

    Raises ``ConfigError`` if the folder holds something else.
    """
    remove_leftovers(folder)
    path = folder / PROGRESS_FILE
    if path.exists() and (folder / TOKENIZER_FOLDER).exists():
        progress = _load(path)
        check_signature(folder, "an unfinished preparation", progress.signature, signature)
        if progress.modified != modified:
            raise ConfigError(f"output={folder}: input files changed since it was begun; remove it")
    else:
        progress = Progress(signature, modified)
        others = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
        if others and not path.exists():
            raise ConfigError(f"output={folder}: holds other files ({', '.join(others[:3])}, ...)")
        progress.save(folder)
    _drop_uncovered(folder, progress)
    return progress


def check_signature(folder: Path, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ``ConfigError`` naming the fields that differ, with both values."""
    different = [
        f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise ConfigError(
            f"output={folder}: holds {what} with other settings ({'; '.join(different)}); "
            "remove it or name another folder"
        )


def describe_inputs(sources: Sequence[Source]) -> tuple[str, str]:
    """A hash over names and sizes of all input files, and one over their times of change."""
    parts = [part for source in sources for part in source.parts]
    names = [[part.name, part.size] for part in parts]
    return _digest(names), _digest([part.modified_ns for part in parts])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _load(path: Path) -> Progress:
    values = read_sealed_json(path, DataError)
    try:
        values["cursor"] = Cursor(**values["cursor"])
        values["streams"] = {
            stem: StreamState.from_dict(stream) for stem, stream in values["streams"].items()
        }
        return Progress(**values)
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: written by another version; remove its folder") from None


def _drop_uncovered(folder: Path, progress: Progress) -> None:
    """Remove shards that were begun after the progress was saved."""
    shards = folder / SHARD_FOLDER
    with storage_errors(shards):
        shards.mkdir(exist_ok=True)
        keep: set[str] = set()
        for stem, stream in progress.streams.items():
            keep |= stream.closed.keys()
            if stream.open_tokens:
                keep.add(stream.next_shard(stem))
        for path in sorted(shards.iterdir()):
            if f"{SHARD_FOLDER}/{path.name}" not in keep:
                fileops.remove(path)

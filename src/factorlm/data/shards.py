"""Write token shards: flat little-endian ids without header or footer.

A stream (one source in one split) is a row of shards of ``shard_tokens`` ids each, the last one
shorter. Shards grow in place; what counts of them is said by the progress file and, at the end, by
the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from factorlm.errors import DataError
from factorlm.storage import FileEntry, fileops, storage_errors

SHARD_FOLDER = "shards"
MAX_UINT16_VOCAB = 2**16


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type for ids below ``vocab_size``: uint16 up to 65536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= MAX_UINT16_VOCAB else "<u4")


def to_token_dtype(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Narrow integer ids, shape (tokens,). Raises ``DataError`` for one outside the vocabulary."""
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        raise DataError(f"token id {ids[wrong][0]} is outside the vocabulary of {vocab_size:,} ids")
    return ids.astype(token_dtype(vocab_size))


@dataclass
class StreamState:
    """What is durable of a stream."""

    closed: dict[str, FileEntry] = field(default_factory=dict)
    """Finished shards, in order."""
    open_tokens: int = 0
    """Ids in the shard after them."""
    num_tokens: int = 0
    num_documents: int = 0
    num_text_bytes: int = 0

    def next_shard(self, stem: str) -> str:
        """Name of the shard that is being filled."""
        return f"{SHARD_FOLDER}/{stem}-{len(self.closed):05d}.bin"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamState:
        """Read what ``dataclasses.asdict`` made."""
        closed = {name: FileEntry(**entry) for name, entry in values["closed"].items()}
        return cls(**{**values, "closed": closed})


class StreamWriter:
    """Appends ids to the shards of one stream."""

    def __init__(
        self, root: Path, stem: str, vocab_size: int, shard_tokens: int, state: StreamState
    ) -> None:
        """``stem`` names the shards, ``state`` says where to go on; ids after it are dropped."""
        self.state = state
        self._root, self._stem = root, stem
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._item = token_dtype(vocab_size).itemsize
        self._file: FileIO | None = None
        self._digest = xxhash.xxh3_128()
        if state.open_tokens:
            self._reopen()

    def append(self, ids: np.ndarray) -> bool:
        """Write ids, shape (tokens,); returns whether a shard was finished."""
        ids = to_token_dtype(ids, self._vocab_size)
        finished = False
        while len(ids):
            part = ids[: self._shard_tokens - self.state.open_tokens]
            self._write(part)
            ids = ids[len(part) :]
            if self.state.open_tokens == self._shard_tokens:
                self.close()
                finished = True
        return finished

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None:
            with storage_errors(self._file.name):
                fileops.fsync(self._file)

    def close(self) -> None:
        """Finish the shard that is being filled, if there is one."""
        if self._file is None:
            return
        self.sync()
        self._file.close()
        entry = FileEntry(self.state.open_tokens * self._item, self._digest.hexdigest())
        self.state.closed[self.state.next_shard(self._stem)] = entry
        self.state.open_tokens = 0
        self._file, self._digest = None, xxhash.xxh3_128()

    def abandon(self) -> None:
        """Let go of the file; what is in it after the last ``sync`` is dropped by the next run."""
        if self._file is not None:
            self._file.close()

    def _write(self, ids: np.ndarray) -> None:
        path = self._root / self.state.next_shard(self._stem)
        with storage_errors(path, need_bytes=ids.nbytes):
            if self._file is None:
                self._file = fileops.open_append(path)
            fileops.write(self._file, ids.data)
        self._digest.update(ids.data)
        self.state.open_tokens += len(ids)
        self.state.num_tokens += len(ids)

    def _reopen(self) -> None:
        path = self._root / self.state.next_shard(self._stem)
        size = self.state.open_tokens * self._item
        if not path.is_file() or path.stat().st_size < size:
            raise DataError(f"{path}: shorter than the {size:,} bytes that were written")
        with storage_errors(path):
            fileops.truncate(path, size)
            self._file = fileops.open_append(path)
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(2**20):
                self._digest.update(chunk)

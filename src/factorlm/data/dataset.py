"""Open prepared token shards and read any range of them.

Reads go through ``os.pread`` into the caller's array: faster in random order than a memory map, and
a shard that is cut short while it is read is an error and not the end of the process.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from factorlm.data.shards import token_dtype
from factorlm.data.tokenizer import TextTokenizer, load_tokenizer
from factorlm.errors import DataError, did_you_mean
from factorlm.storage import MANIFEST_FILE, Manifest, read_manifest, verify

KIND = "factorlm token shards"
TOKENIZER_FOLDER = "tokenizer"
MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class TokenStream:
    """The ids of one source in one split, as one long row."""

    source: str
    weight: float
    """How many times an epoch goes over it."""
    num_tokens: int
    num_documents: int
    num_text_bytes: int
    """UTF-8 bytes of the text, without the ends of documents."""
    shards: tuple[str, ...]
    """Names relative to the dataset, in order."""
    _files: ShardFiles = field(repr=False, compare=False)
    _ends: tuple[int, ...] = field(repr=False, compare=False)
    """Number of ids up to the end of each shard."""

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill ``out``, shape (n,) of the dataset's dtype, with ids ``start`` to ``start + n``.

        Raises ``DataError`` naming shard and offset if a shard is shorter than it was.
        """
        done, index = 0, bisect.bisect_right(self._ends, start)
        while done < len(out):
            begin = self._ends[index - 1] if index else 0
            count = min(self._ends[index] - start - done, len(out) - done)
            self._files.read_into(
                self.shards[index], start + done - begin, out[done : done + count]
            )
            done += count
            index += 1

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` ids from ``start`` on, in the dataset's dtype."""
        out = np.empty(count, dtype=self._files.dtype)
        self.read_into(start, out)
        return out


@dataclass(frozen=True)
class Split:
    """All streams of one split, in the order of the sources."""

    name: str
    streams: tuple[TokenStream, ...]

    @property
    def num_tokens(self) -> int:
        """Ids, the ends of documents included."""
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def num_documents(self) -> int:
        """Documents that have some text in this split."""
        return sum(stream.num_documents for stream in self.streams)

    @property
    def num_text_bytes(self) -> int:
        """UTF-8 bytes of the text, for bits per byte."""
        return sum(stream.num_text_bytes for stream in self.streams)

    @property
    def num_shards(self) -> int:
        """Files."""
        return sum(len(stream.shards) for stream in self.streams)


@dataclass(frozen=True)
class TokenDataset:
    """A folder that ``factorlm prepare`` wrote."""

    path: Path
    dtype: np.dtype[Any]
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    manifest: Manifest

    @property
    def tokenizer_folder(self) -> Path:
        """For ``load_tokenizer`` or ``transformers.AutoTokenizer.from_pretrained``."""
        return self.path / TOKENIZER_FOLDER

    def load_tokenizer(self) -> TextTokenizer:
        """The tokenizer; raises ``DataError`` if it is not the one that made the shards."""
        tokenizer = load_tokenizer(self.tokenizer_folder)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DataError(f"{self.tokenizer_folder}: not the tokenizer that made these shards")
        return tokenizer

    def split(self, name: str) -> Split:
        """A split by name. Raises ``DataError`` with the names that there are."""
        if name not in self.splits:
            known = ", ".join(self.splits)
            hint = did_you_mean(name, self.splits)
            raise DataError(f"{self.path}: no split '{name}'; it has {known}.{hint}")
        return self.splits[name]

    def verify(self) -> None:
        """Read every file and compare its checksum; raises ``DataError`` naming a damaged one."""
        verify(self.path, DataError)


def open_dataset(path: str | os.PathLike[str]) -> TokenDataset:
    """Open a prepared folder; the size of every file is checked, checksums are by ``verify()``.

    Raises ``DataError`` naming the file and what is wrong with it.
    """
    path = Path(path)
    manifest = read_manifest(path, DataError)
    try:
        return _from_manifest(path, manifest)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path / MANIFEST_FILE}: not of token shards ({reason})") from None


def _from_manifest(path: Path, manifest: Manifest) -> TokenDataset:
    extra = manifest.extra
    if extra["kind"] != KIND:
        raise DataError(f"{path / MANIFEST_FILE}: kind is {extra['kind']!r}, not {KIND!r}")
    dtype = token_dtype(extra["vocab_size"])
    files = ShardFiles(path, dtype)
    splits = {}
    for name, streams in extra["splits"].items():
        found = (_stream(entry, extra["sources"], manifest, files) for entry in streams)
        splits[name] = Split(name, tuple(found))
    return TokenDataset(
        path=path,
        dtype=dtype,
        vocab_size=extra["vocab_size"],
        eos_id=extra["eos_id"],
        tokenizer_fingerprint=extra["tokenizer_fingerprint"],
        splits=splits,
        manifest=manifest,
    )


def _stream(
    entry: dict[str, Any], sources: list[dict[str, Any]], manifest: Manifest, files: ShardFiles
) -> TokenStream:
    source = sources[entry["source"]]
    shards = tuple(entry["shards"])
    sizes = [manifest.files[name].size // files.dtype.itemsize for name in shards]
    ends = tuple(itertools.accumulate(sizes))
    if sum(sizes) != entry["num_tokens"]:
        raise DataError(f"shards hold {sum(sizes):,} ids, the manifest says {entry['num_tokens']}")
    return TokenStream(
        source=source["spec"],
        weight=source["weight"],
        num_tokens=entry["num_tokens"],
        num_documents=entry["num_documents"],
        num_text_bytes=entry["num_text_bytes"],
        shards=shards,
        _files=files,
        _ends=ends,
    )


class ShardFiles:
    """Open shards of one dataset, the least recently used closed first; for one thread."""

    def __init__(self, root: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fill ``out`` with ids from ``offset`` (in ids) of shard ``name``."""
        rest = memoryview(out.data).cast("B")
        position = offset * self.dtype.itemsize
        while rest:
            try:
                count = os.preadv(self._descriptor(name), [rest], position)
            except OSError as error:
                raise DataError(f"{self._root / name}: cannot be read: {error}") from error
            if count == 0:
                raise DataError(
                    f"{self._root / name}: cut short, it ends at byte {position:,} where the "
                    "manifest promises more"
                )
            rest, position = rest[count:], position + count

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[name]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

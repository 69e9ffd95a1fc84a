"""A document as a range of UTF-8 bytes, and the places where a long one may be cut."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from factorlm.data.tokenizer import TextTokenizer
from factorlm.errors import DataError

PIECE_BYTES = 256 * 2**10
"""A long document is encoded in pieces of about this size; larger ones are slower to encode."""
WINDOW_BYTES = 2**10
"""How far to either side of a cut its effect on the ids is looked at."""
MAX_WHOLE_BYTES = 4 * 2**20
"""The longest text without a cut: encoding it takes about 100 times its size in memory."""


@dataclass(frozen=True)
class Document(ABC):
    """One document that is known to be valid UTF-8."""

    origin: str
    """Where it comes from, as ``file:line``, for messages."""
    position: int
    """Bytes of the input file that are read once this document is done."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Length of the UTF-8 text."""

    @abstractmethod
    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of the text."""


@dataclass(frozen=True)
class TextDocument(Document):
    """A document in memory."""

    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


@dataclass(frozen=True)
class FileDocument(Document):
    """A text file of any size, read piece by piece."""

    path: Path
    head: int
    """Bytes in front of the text (a byte order mark)."""
    size: int

    @property
    def num_bytes(self) -> int:
        return self.size

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, self.head + start)
        if len(data) != stop - start:
            raise DataError(f"{self.path}: changed while it was read")
        return data


def cut_document(
    document: Document, start: int, stop: int, tokenizer: TextTokenizer
) -> Iterator[tuple[int, int]]:
    """Byte ranges that cover ``start`` to ``stop`` and, encoded one by one, give the ids of it all.

    Raises ``DataError`` if more than ``MAX_WHOLE_BYTES`` have no place to cut.
    """
    while stop - start > PIECE_BYTES + WINDOW_BYTES:
        cut = _next_cut(document, start, stop, tokenizer)
        yield start, cut
        start = cut
    if start < stop:
        yield start, stop


def next_character(document: Document, position: int) -> int:
    """The first position at or after ``position`` where a character begins."""
    for byte in document.read(position, min(position + 4, document.num_bytes)):
        if byte & 0xC0 != 0x80:
            break
        position += 1
    return position


def _next_cut(document: Document, start: int, stop: int, tokenizer: TextTokenizer) -> int:
    if tokenizer.cuts_text:
        last = min(start + MAX_WHOLE_BYTES, stop) - WINDOW_BYTES
        for middle in range(start + PIECE_BYTES, last, 4 * WINDOW_BYTES):
            cut = _cut_near(document, middle, tokenizer)
            if cut is not None:
                return cut
    if stop - start <= MAX_WHOLE_BYTES:
        return stop
    raise DataError(
        f"{document.origin}: {stop - start:,} bytes of text without a place where the tokenizer "
        f"cuts; at most {MAX_WHOLE_BYTES:,} can be encoded at once"
    )


def _cut_near(document: Document, middle: int, tokenizer: TextTokenizer) -> int | None:
    begin = next_character(document, middle - WINDOW_BYTES)
    end = next_character(document, middle + WINDOW_BYTES)
    window = document.read(begin, end).decode("utf-8")
    cut = tokenizer.find_cut(window)
    return None if cut is None else begin + len(window[:cut].encode("utf-8"))

"""From sources to encoding tasks, in one fixed order that can be taken up at any task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from factorlm.data.documents import PIECE_BYTES, Document, cut_document
from factorlm.data.readers import BadRecord
from factorlm.data.sources import Source, SourcePart
from factorlm.data.splits import TRAIN, Place, SplitRule
from factorlm.data.tokenizer import TextTokenizer
from factorlm.errors import DataError

MIN_SAMPLED_PARTS = 64

Stream = tuple[str, int]
"""(split, number of the source)."""


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on."""

    source: int = 0
    part: int = 0
    record: int = 0
    """Within the part."""
    offset: int = 0
    """Bytes of the record's text that are done."""


@dataclass(frozen=True)
class Piece:
    """A part of a document that is encoded at once."""

    stream: Stream
    data: bytes
    begins_document: bool
    ends_document: bool


@dataclass
class Task:
    """Pieces to encode together, and what was passed over on the way to them."""

    pieces: list[Piece] = field(default_factory=list)
    cursor: Cursor = field(default_factory=Cursor)
    """Behind the last piece."""
    position: int = 0
    """Bytes of all input that are read, for a progress bar."""
    num_records: int = 0
    num_empty: int = 0
    """Documents without text, which are left out."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Bad records by reason."""
    num_text_bytes: int = 0

    def add(self, piece: Piece, after: Cursor) -> None:
        """Append a piece; ``after`` is the cursor behind it."""
        self.pieces.append(piece)
        self.num_text_bytes += len(piece.data)
        self.cursor = after


@dataclass(frozen=True)
class Planner:
    """Reads sources in order and cuts their documents into tasks."""

    sources: Sequence[Source]
    rules: Sequence[SplitRule]
    """One for each source."""
    text_column: str
    tolerant: bool
    """Count bad records; otherwise the first one is a ``DataError``."""

    def tasks(self, tokenizer: TextTokenizer, cursor: Cursor) -> Iterator[Task]:
        """Tasks of about ``PIECE_BYTES`` of text from ``cursor`` to the end."""
        task = Task(cursor=cursor)
        for here, position, record in self._records(cursor):
            task.position = position
            task.num_records += here.offset == 0
            if isinstance(record, BadRecord):
                self._reject(record, task)
            else:
                task.num_empty += record.num_bytes == 0
                for piece, after in self._pieces(here, record, tokenizer):
                    task.add(piece, after)
                    if task.num_text_bytes >= PIECE_BYTES:
                        yield task
                        task = Task(cursor=after, position=position)
            task.cursor = replace(here, record=here.record + 1, offset=0)
        yield task

    def sample(self, num_bytes: int) -> Iterator[str]:
        """Training text for a tokenizer: from parts all over the sources, from each its head."""
        chosen = self._sampled_parts(num_bytes)
        total = sum(part.size or 1 for _, _, part in chosen)
        for source, number, part in chosen:
            budget = num_bytes * (part.size or 1) // total
            for text in self._training_text(source, number, part):
                yield text[:budget]
                budget -= len(text)
                if budget <= 0:
                    break

    def _records(self, cursor: Cursor) -> Iterator[tuple[Cursor, int, Document | BadRecord]]:
        """All records from ``cursor`` on, each with its own cursor and the input bytes read."""
        done = 0
        for source_number, source in enumerate(self.sources):
            for part_number, part in enumerate(source.parts):
                place = (source_number, part_number)
                if place >= (cursor.source, cursor.part):
                    here = Cursor(*place)
                    here = cursor if place == (cursor.source, cursor.part) else here
                    for record in part.read(self.text_column, here.record):
                        yield here, done + record.position, record
                        here = Cursor(*place, record=here.record + 1)
                done += part.size or 0

    def _reject(self, record: BadRecord, task: Task) -> None:
        if not self.tolerant:
            raise DataError(f"{record.origin}: {record.reason}")
        task.rejected[record.reason] += 1

    def _pieces(
        self, cursor: Cursor, document: Document, tokenizer: TextTokenizer
    ) -> Iterator[tuple[Piece, Cursor]]:
        """Pieces of a document from the cursor's offset on, each with the cursor behind it."""
        part = self.sources[cursor.source].parts[cursor.part]
        for segment in self.rules[cursor.source].segments(_place(part, cursor), document):
            start = max(segment.start, cursor.offset)
            for begin, end in cut_document(document, start, segment.stop, tokenizer):
                piece = Piece(
                    stream=(segment.split, cursor.source),
                    data=document.read(begin, end),
                    begins_document=begin == segment.start,
                    ends_document=end == segment.stop and segment.ends_document,
                )
                yield piece, replace(cursor, offset=end)

    def _sampled_parts(self, num_bytes: int) -> list[tuple[int, int, SourcePart]]:
        """(source, number, part) evenly spaced, so many that together they hold ``num_bytes``."""
        parts = [
            (source_number, part_number, part)
            for source_number, source in enumerate(self.sources)
            for part_number, part in enumerate(source.parts)
        ]
        total = sum(part.size or 0 for _, _, part in parts)
        wanted = -(-len(parts) * num_bytes // max(total, 1))
        count = min(max(wanted, MIN_SAMPLED_PARTS), len(parts))
        return [parts[index * len(parts) // count] for index in range(count)]

    def _training_text(self, source: int, number: int, part: SourcePart) -> Iterator[str]:
        for index, record in enumerate(part.read(self.text_column, 0)):
            if isinstance(record, BadRecord):
                continue
            place = _place(part, Cursor(source, number, index))
            for segment in self.rules[source].segments(place, record):
                if segment.split == TRAIN:
                    yield from _chunks(record, segment.start, segment.stop)


def _place(part: SourcePart, cursor: Cursor) -> Place:
    return Place(0, cursor.part) if part.is_document else Place(1 + cursor.part, cursor.record)


def _chunks(document: Document, start: int, stop: int) -> Iterator[str]:
    """Text in chunks of ``PIECE_BYTES``; a character at their ends may be lost."""
    for begin in range(start, stop, PIECE_BYTES):
        data = document.read(begin, min(begin + PIECE_BYTES, stop))
        yield data.decode("utf-8", errors="ignore")

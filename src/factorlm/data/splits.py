"""Which part of a source trains and which validates, by rules that need no second look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from factorlm.data.documents import Document, next_character
from factorlm.data.permutation import hash_key

TRAIN = "train"
VALIDATION = "validation"


@dataclass(frozen=True)
class Segment:
    """A byte range of a document and the split that it goes to."""

    split: str
    start: int
    stop: int
    ends_document: bool
    """Whether the end-of-document id follows."""


@dataclass(frozen=True)
class Place:
    """Where a document stands in its source, known without reading what is before it."""

    row: int
    """Which run of documents: 0 for files of one document, 1 + part for a part of many records."""
    index: int
    """Its number in the row."""


class SplitRule(ABC):
    """Assigns every byte of every document of one source."""

    @abstractmethod
    def segments(self, place: Place, document: Document) -> Iterator[Segment]:
        """Segments of the source's document at ``place``, in order."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The rule in plain JSON, for the manifest."""


@dataclass(frozen=True)
class WholeSource(SplitRule):
    """All of the source goes to one split."""

    split: str

    def segments(self, place: Place, document: Document) -> Iterator[Segment]:
        yield Segment(self.split, 0, document.num_bytes, True)

    def to_dict(self) -> dict[str, Any]:
        return {"rule": "whole source"}


@dataclass(frozen=True)
class TailOfText(SplitRule):
    """The last ``fraction`` of the text's bytes validates; nothing is put in at the cut."""

    fraction: Fraction

    def segments(self, place: Place, document: Document) -> Iterator[Segment]:
        size = document.num_bytes
        cut = next_character(document, int(size * (1 - self.fraction)))
        yield Segment(TRAIN, 0, cut, False)
        yield Segment(VALIDATION, cut, size, True)

    def to_dict(self) -> dict[str, Any]:
        return {"rule": "tail of the text", "fraction": float(self.fraction)}


@dataclass(frozen=True)
class ByDocument(SplitRule):
    """Of every 1/``fraction`` documents in a row, one that a hash picks validates.

    So the number of validation documents is exact to one a row, and whether a document validates
    depends on ``seed``, its source and its place alone.
    """

    fraction: Fraction
    seed: int
    source: int

    def segments(self, place: Place, document: Document) -> Iterator[Segment]:
        split = VALIDATION if self.validates(place) else TRAIN
        yield Segment(split, 0, document.num_bytes, True)

    def validates(self, place: Place) -> bool:
        """Whether the document at ``place`` is the picked one of its group."""
        numerator, denominator = self.fraction.as_integer_ratio()
        group = place.index * numerator // denominator
        first = -(-group * denominator // numerator)
        size = -(-(group + 1) * denominator // numerator) - first
        pick = hash_key(self.seed, self.source, place.row, group) % size
        return place.index - first == pick

    def to_dict(self) -> dict[str, Any]:
        return {"rule": "by document", "fraction": float(self.fraction), "seed": self.seed}

"""Split rules: exact counts, no byte lost, nothing that depends on what was read before."""

from __future__ import annotations

from fractions import Fraction

import pytest

from factorlm.data.documents import TextDocument
from factorlm.data.splits import ByDocument, Place, TailOfText, WholeSource


@pytest.mark.parametrize("fraction", ["0.1", "0.5", "0.015", "0.3", "0.9", "0.999", "1e-3"])
@pytest.mark.parametrize("row", [0, 1, 7])
def test_by_document_counts_are_exact_to_one(fraction, row):
    rule = ByDocument(Fraction(fraction), seed=3, source=0)
    count = 0
    for index in range(3000):
        count += rule.validates(Place(row, index))
        assert abs(count - (index + 1) * rule.fraction) <= 1


def test_by_document_depends_on_seed_source_and_row():
    def chosen(seed, source, row):
        rule = ByDocument(Fraction("0.1"), seed, source)
        return tuple(index for index in range(1000) if rule.validates(Place(row, index)))

    base = chosen(0, 0, 0)
    assert base == chosen(0, 0, 0)
    assert len({base, chosen(1, 0, 0), chosen(0, 1, 0), chosen(0, 0, 1)}) == 4
    assert len({index % 10 for index in base}) == 10


@pytest.mark.parametrize("text", ["", "a", "0123456789" * 11, "é" * 50, "漢🎉" * 33])
@pytest.mark.parametrize("fraction", ["0.1", "0.5", "0.01"])
def test_the_tail_is_the_last_bytes_cut_between_characters(text, fraction):
    data = text.encode("utf-8")
    document = TextDocument("", 0, data)
    head, tail = TailOfText(Fraction(fraction)).segments(Place(0, 0), document)
    assert (head.start, head.stop, tail.start, tail.stop) == (0, tail.start, head.stop, len(data))
    assert (head.split, tail.split) == ("train", "validation")
    assert (head.ends_document, tail.ends_document) == (False, True)
    assert 0 <= head.stop - int(len(data) * (1 - Fraction(fraction))) < 4
    data[: head.stop].decode("utf-8")


def test_the_tail_of_an_ascii_text_is_as_others_cut_it():
    """nanoGPT's ``data[:int(n * 0.9)]``."""
    document = TextDocument("", 0, b"x" * 1_115_394)
    head, _ = TailOfText(Fraction("0.1")).segments(Place(0, 0), document)
    assert head.stop == int(1_115_394 * 0.9) == 1_003_854


def test_a_whole_source():
    (segment,) = WholeSource("validation").segments(Place(0, 5), TextDocument("", 0, b"abc"))
    assert (segment.split, segment.start, segment.stop, segment.ends_document) == (
        "validation", 0, 3, True,
    )  # fmt: skip

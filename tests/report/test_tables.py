from __future__ import annotations

import pytest

from factorlm.report.tables import (
    Table,
    format_count,
    format_power,
    format_scientific,
    format_seconds,
    format_tick,
)

TABLE = Table(header=("", "a", "b", ""), rows=(("first", "1", "22", ""), ("x|y", "333", "", "")))


def test_plain_aligns_and_leaves_out_empty_columns() -> None:
    assert TABLE.plain().splitlines() == [
        "         a   b",
        "─────  ───  ──",
        "first    1  22",
        "x|y    333",
    ]


def test_markdown_escapes_bars() -> None:
    assert TABLE.markdown().splitlines() == [
        "|  | a | b |  |",
        "| :-- | --: | --: | --: |",
        "| first | 1 | 22 |  |",
        "| x\\|y | 333 |  |  |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (0.125, "0.125"),
        (10_000, "10.00K"),
        (317_440, "317.4K"),
        (999_949, "999.9K"),
        (999_960, "1.000M"),
        (1_274_140_000, "1.274B"),
        (9_999_960_000, "10.00B"),
        (2e12, "2.000T"),
    ],
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.5, "2.5"), (250_000, "250K"), (1.5e6, "1.5M"), (2e9, "2B"), (1.5e13, "15T")],
)
def test_format_tick(value: float, text: str) -> None:
    assert format_tick(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (50_000_000_000, "5e10"), (7.5e18, "7.5e18")]
)
def test_format_power(value: float, text: str) -> None:
    assert format_power(value) == text


def test_format_scientific() -> None:
    assert format_scientific(7.0438e19) == "7.044e19"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.26, "8.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00 min"),
        (125, "2:05 min"),
        (3599.7, "1:00:00 h"),
        (3723, "1:02:03 h"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text

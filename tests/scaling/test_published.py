"""The shipped points agree with each other and with what the papers say."""

from __future__ import annotations

import math

import pytest

from factorlm.errors import ConfigError
from factorlm.records import PublishedRecord
from factorlm.scaling import (
    compare_lines,
    fit_line,
    hold_out_largest,
    published_families,
    published_records,
)
from factorlm.scaling.published import CERTAINTY, SIZES

COUNTS = {
    "scaling": 12,
    "main": 26,
    "self-guided": 20,
    "wide": 8,
    "ffn latency": 20,
    "few-token latency": 45,
    "ablations": 5,
}


def by_name(table: str) -> dict[tuple[str, str | None], PublishedRecord]:
    return {(record.model, record.size): record for record in published_records(table)}


def test_every_value_has_a_mark_that_is_explained() -> None:
    for record in published_records():
        assert record.values.keys() == record.certainty.keys()
        assert set(record.certainty.values()) <= set(CERTAINTY)
        assert record.size in (*SIZES, None)
        assert all(value > 0 for value in record.values.values())


def test_all_tables_are_there() -> None:
    assert {table: len(published_records(table)) for table in COUNTS} == COUNTS
    assert len(published_records()) == sum(COUNTS.values())
    with pytest.raises(ConfigError, match="Did you mean 'scaling'"):
        published_records("scalling")


def test_losses_of_the_figure_are_perplexities_of_the_table() -> None:
    """Two readings of one run: within what either reading may err."""
    main = by_name("main")
    for (model, size), record in by_name("scaling").items():
        other = main[model, size].values
        tolerance = 0.06 if record.note else 0.03
        assert math.exp(record.values["loss"]) == pytest.approx(other["perplexity"], abs=tolerance)
        assert record.values["training_flops"] == pytest.approx(other["training_flops"], rel=0.01)


def test_dense_is_the_same_in_every_table() -> None:
    main, guided, wide = by_name("main"), by_name("self-guided"), by_name("wide")
    for size in SIZES:
        perplexity = main["dense", size].values["perplexity"]
        assert guided["dense", size].values["perplexity"] == perplexity
        if ("dense", size) in wide:
            assert wide["dense", size].values["perplexity"] == perplexity


def test_latency_ratios_are_those_that_the_papers_print() -> None:
    found = {
        (record.model, record.values["hidden_size"]): record.values["latency_ms"]
        for record in published_records("ffn latency")
    }
    dense = found["dense", 5120]
    ratios = {model: dense / ms for (model, width), ms in found.items() if width == 5120}
    assert [round(ratio, 1) for ratio in ratios.values()] == [1.0, 1.4, 1.1, 2.6, 2.0]
    few = {
        record.model: record.values["latency_ms"]
        for record in published_records("few-token latency")
        if (record.values["hidden_size"], record.values["num_tokens"]) == (5120, 2048)
    }
    assert few["dense"] / few["low_rank 32 %, pre-merged"] == pytest.approx(2.63, abs=0.01)


def test_slopes_and_what_the_points_say_of_steeper() -> None:
    families = published_families()
    slopes = {name: fit_line(*points) for name, points in families.items()}
    assert [round(fit.slope, 4) for fit in slopes.values()] == [-0.0535, -0.0546, -0.0562]
    assert all(0.0045 < fit.slope_high - fit.slope < 0.008 for fit in slopes.values())
    found = compare_lines(families, "dense")
    assert [one.slopes.is_steeper for one in found.values()] == [None, None]
    split = found["low_rank 32 %"].split
    assert split is not None
    assert split.total == pytest.approx(-0.0026, abs=5e-5)
    assert split.flops_part == pytest.approx(-0.0018, abs=1e-4)
    assert split.gap_part_low < 0 < split.gap_part_high
    assert not any(one.crossing.is_within for one in found.values())


def test_the_largest_is_predicted_within_half_a_percent() -> None:
    for points in published_families().values():
        assert abs(hold_out_largest(fit_line, *points).error) < 0.005

"""The published self-guided runs beside their control."""

from __future__ import annotations

import pytest

from factorlm.report.guided import UNGUIDED, _draw, guided_sizes, guided_table
from factorlm.scaling import published_records


def test_shares_of_the_gap_are_those_that_follow_from_the_points() -> None:
    rows = guided_sizes()
    beyond_control = [round(100 * row.closed_beyond_control) for row in rows]
    assert beyond_control == [16, 13, 19, -36]
    assert [round(100 * row.closed_beyond_unguided) for row in rows] == [75, 78, 72, 61]


def test_the_control_wins_at_the_largest_size() -> None:
    *smaller, largest = guided_sizes()
    assert all(row.guided < row.control for row in smaller)
    assert largest.control < largest.guided
    assert guided_table().rows[-1][-2:] == ("-36 %", "61 %")


def test_the_control_has_the_dense_models_flops() -> None:
    """More tokens by the ratio of FLOPs; the figure's axis gives them to a per cent or two."""
    flops = {
        (record.model, record.size): record.values["training_flops"]
        for record in published_records("main")
        if "training_flops" in record.values
    }
    tokens = {"s": 2.2e9, "m": 6.7e9, "l": 14.58e9, "xl": 25.5e9}
    for row in guided_sizes():
        ratio = row.training_flops / flops[UNGUIDED, row.size]
        assert row.control_tokens == pytest.approx(tokens[row.size] * ratio, rel=0.02)


def test_the_picture_has_every_model() -> None:
    left, right = _draw().axes
    labels = left.get_legend_handles_labels()[1]
    assert len(labels) == 4
    assert any("more tokens" in label for label in labels)
    assert len(right.patches) == 3 * 4
    heights = [bar.get_height() for bar in right.patches[4:8]]
    assert heights == pytest.approx([row.gap("control") for row in guided_sizes()])

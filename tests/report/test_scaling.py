"""Tables, sentences and the picture of fitted laws."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from factorlm.report.claims import claim_sentences, split_notes
from factorlm.report.scaling import (
    chance,
    entropy_table,
    gamma_table,
    held_out_table,
    lines_table,
    multiplier_table,
)
from factorlm.report.scaling_picture import _draw, plot_scaling
from factorlm.scaling import (
    compare_lines,
    fit_line,
    fit_power_laws,
    hold_out_largest,
    slopes_over_entropy,
)

COMPUTE = np.repeat(np.geomspace(1e15, 1e19, 5), 2)
NOISE = np.random.default_rng(0).normal(0, 0.002, (2, 10))
FAMILIES = {
    "dense": (COMPUTE, 3.0 * (COMPUTE / 1e17) ** -0.05 * np.exp(NOISE[0])),
    "low_rank": (COMPUTE, 3.1 * (COMPUTE / 1e17) ** -0.06 * np.exp(NOISE[1])),
}
LINES = {name: fit_line(*points) for name, points in FAMILIES.items()}
OVER = slopes_over_entropy(FAMILIES, "dense", (0.0, 1.0))


def test_lines_are_beside_what_they_differ_by() -> None:
    found = compare_lines(FAMILIES, "dense")
    dense, other = lines_table(LINES, found, "dense").rows
    assert dense[:2] == ("dense", f"{LINES['dense'].slope:.4f}")
    assert set(dense[3:]) == {""}
    difference = LINES["low_rank"].slope - LINES["dense"].slope
    assert float(other[3]) == pytest.approx(difference, abs=6e-5)
    assert float(other[6]) + float(other[7]) == pytest.approx(float(other[3]), abs=2e-4)


def test_other_tables_hold_the_numbers_of_the_fits() -> None:
    comparison = compare_lines(FAMILIES, "dense")["low_rank"]
    rows = entropy_table(OVER, {"low_rank": comparison.slopes}, "dense").rows
    assert [row[0] for row in rows] == ["0.00", "1.00", "0.00, fitted"]
    assert rows[1][1] == f"{OVER['low_rank'][1].difference:+.4f}"
    assert rows[2][1] == f"{comparison.slopes.difference:+.4f}"
    cells = multiplier_table(comparison).rows
    assert [float(row[3]) for row in cells] == pytest.approx(
        [one.multiplier for one in comparison.multipliers], abs=0.006
    )
    held = {"line": {"dense": hold_out_largest(fit_line, *FAMILIES["dense"])}}
    ((family, size, loss, predicted, error),) = held_out_table(held).rows
    assert (family, size) == ("dense", "1.000e19")
    assert float(predicted) / float(loss) - 1 == pytest.approx(
        float(error.rstrip(" %")) / 100, abs=1e-4
    )


@pytest.mark.filterwarnings("ignore::factorlm.scaling.FitWarning")
def test_exponents_and_local_slopes_are_over_the_entropy() -> None:
    over = [fit_power_laws(FAMILIES, E=E) for E in (0.0, 1.0)]
    fitted = fit_power_laws(FAMILIES)
    table = gamma_table(over, fitted, 3.2)
    assert table.header[1:4] == ("γ dense", "95 %", "slope at 3.20")
    for laws, row in zip([*over, fitted], table.rows, strict=True):
        law = laws["low_rank"]
        assert row[0] == f"{law.E:.2f}" + (", fitted" if laws is fitted else "")
        assert float(row[4]) == pytest.approx(law.gamma, abs=6e-5)
        assert row[5] == f"{law.gamma_low:.4f} to {law.gamma_high:.4f}"
        assert float(row[6]) == pytest.approx(-law.gamma * (1 - law.E / 3.2), abs=6e-5)


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(0.236, "0.24"), (0.0034, "0.003"), (1e-7, "< 0.001"), (math.nan, "not known")],
)
def test_small_p_values_are_not_nought(p_value: float, text: str) -> None:
    assert chance(p_value) == text


@pytest.mark.parametrize(
    ("base", "verdict"), [("dense", "it is steeper"), ("low_rank", "it is flatter")]
)
def test_a_clear_difference_is_said(base: str, verdict: str) -> None:
    (comparison,) = compare_lines(FAMILIES, base).values()
    first, split, turning, *_ = claim_sentences(comparison, math.nan)
    assert first.endswith(f": {verdict}.")
    assert split.startswith("Of that, +0.0000 is the ratio of FLOPs") or "-0.0000 is" in split
    assert "the same for every shared entropy" in turning


def test_the_parts_of_a_difference_are_said_of_what_they_add_up_to() -> None:
    """Numbers as printed: with equal seeds the difference itself, else another, which is named."""
    far = np.repeat([1.0, 1.01, 1.0], [1, 1, 8])  # one of the seeds of the smallest size
    fewer = {name: (compute[:-1], (far * loss)[:-1]) for name, (compute, loss) in FAMILIES.items()}
    for families, start in (
        (fewer, "Of that, "),
        (
            fewer | {"dense": (COMPUTE[1:], FAMILIES["dense"][1][1:])},
            "With sizes weighed alike in both",
        ),
    ):
        comparison = compare_lines(families, "dense")["low_rank"]
        difference, split, *_ = claim_sentences(comparison, math.nan)
        assert split.startswith(start)
        whole = re.findall(r"slopes differ by (\S+\d)", difference + split)[-1]
        parts = re.findall(r"([+-]\S+) (?:is the ratio|the loss gap)", split)
        assert sum(map(float, parts)) == pytest.approx(float(whole), abs=1.5e-4)
        notes = split_notes(comparison)
        assert len(notes) == (start != "Of that, ")
        assert all(f"are those of {whole}, " in note for note in notes)


def test_no_difference_is_said_too() -> None:
    families = {"dense": FAMILIES["dense"], "twin": (COMPUTE, FAMILIES["dense"][1] * 1.01)}
    (comparison,) = compare_lines(families, "dense").values()
    first, _, turning, *_ = claim_sentences(comparison, 1.234)
    assert "the points do not say which is steeper" in first
    assert "turns at a shared entropy E of 1.23 nats" in turning


def test_the_picture_shows_every_point_and_every_entropy(tmp_path: Path) -> None:
    left, right = _draw(FAMILIES, LINES, OVER, "dense").axes
    points = [line for line in left.get_lines() if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in points] == [
        list(loss) for _, loss in FAMILIES.values()
    ]
    drawn = next(line for line in right.get_lines() if line.get_linestyle() == "-")
    assert list(drawn.get_ydata()) == [one.difference for one in OVER["low_rank"]]
    path = plot_scaling(FAMILIES, "dense", tmp_path / "scaling.svg", lines=LINES, over=OVER)
    assert "<svg" in path.read_text()

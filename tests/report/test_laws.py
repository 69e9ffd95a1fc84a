"""The curves that a report draws are those of the fits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tests.report import studies
from tests.report.studies import write_ladder, write_run

from factorlm.report import (
    fit_study,
    fits_text,
    gather,
    report_fits,
    report_markdown,
    write_page,
)
from factorlm.report.fits import fitted_families
from factorlm.report.laws import LINE, MAX_COMPARED, SHARED
from factorlm.report.points import study_of
from factorlm.scaling import fit_line, fit_power_laws, power_law_bands
from factorlm.scaling.fit.data import size_means


def test_curves_and_bands_are_those_of_the_fits(tmp_path: Path) -> None:
    report = gather([write_ladder(tmp_path)])
    fits = report_fits(report)
    families, _ = fitted_families(study_of(report.runs))
    assert fits.laws == (SHARED, LINE)
    assert [curve.family for curve in fits.curves] == ["dense", "low_rank_32"] * 2
    for curve in fits.curves:
        points = families[curve.family]
        line, law = fit_line(*size_means(*points)), fit_power_laws(families)[curve.family]
        places = {curve.family: curve.compute}
        found = (law, power_law_bands(families, places)[curve.family])
        if curve.law == LINE:
            found = (line, line.band(curve.compute))
        np.testing.assert_allclose(curve.loss, found[0].predict(curve.compute))
        np.testing.assert_allclose([curve.low, curve.high], found[1])
        assert curve.compute[0] < points[0].min()
        assert curve.compute[-1] > points[0].max()
    table = fits.tables["Straight lines in log–log"]
    assert table.rows[0][1] == f"{fit_line(*families['dense']).slope:.4f}"
    assert f"{fit_power_laws(families)['dense'].gamma:.4f}" in fits.tables[SHARED].rows[0]
    (note,) = fits.notes  # the points are of curved laws
    assert note.startswith("Straight lines are fitted to the mean of each size")


def test_no_law_where_the_points_do_not_say(tmp_path: Path) -> None:
    """Two sizes: no line. Three of one seed: a line, and no curve that has as many parameters."""
    report = gather([write_ladder(tmp_path / "two", params=[3e4, 1e5])])
    fits = report_fits(report)
    assert not fits.curves
    assert fits.notes == ("No family has 3 sizes of finished runs to fit.",)
    write_ladder(tmp_path / "three", families=["dense"], params=[3e4, 1e5, 3e5], seeds=1)
    write_ladder(tmp_path / "three", families=["low_rank_32"], params=[3e4, 1e5])
    fits = report_fits(gather([tmp_path / "three"]))
    assert fits.laws == (LINE,)
    assert [curve.family for curve in fits.curves] == ["dense"]
    assert "Not fitted, fewer than 3 sizes: low_rank_32." in fits.notes
    assert any(
        f"{SHARED} is not drawn: dense: as many parameters as points" in n for n in fits.notes
    )


def test_a_run_far_off_its_line_is_named(tmp_path: Path) -> None:
    write_ladder(tmp_path, families=["dense"], noise=1e-4)
    labels = {"ladder": "books", "family": "dense", "size": "w5", "stage": "main"}
    options = {"num_params": 3e6, "num_tokens": 6e7, "flops": 6 * 3e6 * 6e7}
    write_run(tmp_path, "diverged", **options, loss=9.0, seed=7, labels=labels)  # type: ignore[arg-type]
    assert any(
        note.startswith("dense: points over 5 standard") and ": 1 of 11." in note
        for note in report_fits(gather([tmp_path])).notes
    )


def test_parts_that_do_not_add_up_are_said_to(tmp_path: Path) -> None:
    """One family lacks a seed of its smallest size: the table's parts are of another difference."""
    write_ladder(tmp_path, noise=0.02)
    assert not any("are those of" in note for note in report_fits(gather([tmp_path])).notes)
    (tmp_path / "dense-w1-s0.jsonl").unlink()
    fits = report_fits(gather([tmp_path]))
    row = fits.tables["Straight lines in log–log"].rows[1]
    parts = float(row[6]) + float(row[7])
    assert parts != pytest.approx(float(row[3]), abs=3e-4)
    (note,) = (note for note in fits.notes if "are those of" in note)
    assert float(note.split("are those of ")[1].split(",")[0]) == pytest.approx(parts, abs=1.5e-4)


def test_losses_that_no_law_describes_are_drawn_without_complaint(tmp_path: Path) -> None:
    """Flat, rising and steep ones, and one that is not finite, still make a page."""
    losses = {"flat": [3.0, 3.0, 3.0], "rising": [3.0, 3.2, 3.5], "steep": [9.0, 2.0, 0.5]}
    for family, values in losses.items():
        for index, loss in enumerate(values):
            params = (10.0 if family != "steep" else 1e5) * 1e4 * 10**index
            labels = {"ladder": "odd", "family": family, "size": str(index), "stage": "main"}
            options = {"num_params": params, "num_tokens": 20 * params, "flops": 120 * params**2}
            write_run(tmp_path, f"{family}-{index}", **options, loss=loss, labels=labels)  # type: ignore[arg-type]
    options = {"num_params": 1e4, "num_tokens": 2e5, "flops": 1e9, "loss": np.inf}
    write_run(tmp_path, "diverged", **options, labels=labels)  # type: ignore[arg-type]
    report = gather([tmp_path])
    fits = report_fits(report)
    assert {curve.family for curve in fits.curves} == set(losses)
    assert write_page(report, tmp_path / "report.html", fits).stat().st_size > 1e6
    text = fits_text(fit_study(study_of(report.runs), base="flat"))
    assert "steep and flat: no crossing within the data, which have no FLOPs in common." in text
    assert "Left out, their last loss is not finite and above 0: diverged." in text


def test_many_families_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"family {index}" for index in range(MAX_COMPARED + 1)]
    for name, table in (("GAMMAS", 0.1), ("SCALES", 3.0), ("SHARES", 1.0)):
        monkeypatch.setattr(studies, name, dict.fromkeys(names, table))
    fits = report_fits(gather([write_ladder(tmp_path, families=names, seeds=1)]))
    assert fits.laws == (LINE,)
    assert len(fits.tables["Straight lines in log–log"].rows) == len(names)
    assert any("9 families are not compared" in note for note in fits.notes)


def test_without_scipy_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gather([write_ladder(tmp_path)])
    monkeypatch.setitem(sys.modules, "scipy", None)
    fits = report_fits(report)
    assert fits.notes == ("No fits: fits need scipy: pip install 'factorlm[fit]'",)
    assert not fits.curves


def test_markdown_has_the_slopes_and_what_is_missing(tmp_path: Path) -> None:
    write_ladder(tmp_path)
    write_ladder(tmp_path / "more", families=["dense"], ladder="other", params=[3e4], seeds=1)
    report = gather([tmp_path])
    fits = report_fits(report)
    text = report_markdown(report, fits)
    assert "**Straight lines in log–log**\n\n| family | slope | 95 % |" in text
    assert "- Not fitted, fewer than 3 sizes: dense, ladder other." in text
    slope = fits.tables["Straight lines in log–log"].rows[0][1]
    assert f"| dense, ladder books | {slope} |" in text
    assert "**" not in report_markdown(report)

"""The picture of a grid of sizes and budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.report.studies import write_grid

from factorlm.report import gather, iso_flops
from factorlm.report.fit_text import plot_fits
from factorlm.report.fits import fit_study
from factorlm.report.points import study_of


def test_points_laws_and_their_lowest_places(tmp_path: Path) -> None:
    def law(params: float, tokens: float, flops: float) -> float:
        return 1.7 + 400 * params**-0.34 + 400 * tokens**-0.28

    fits = fit_study(study_of(gather([write_grid(tmp_path / "grid", law)]).runs))
    family, fit = fits.study.families["dense"], fits.chinchilla["dense"]
    budgets = iso_flops.budgets_of(family)
    assert [len(points) for points in budgets] == [5, 5, 5, 5]
    (axes,) = iso_flops._draw(family, fit, 6.6).axes
    for points, start in zip(budgets, range(0, 16, 4), strict=True):
        curve, dots, interval, star = axes.get_lines()[start : start + 4]
        assert list(dots.get_ydata()) == [loss for point in points for loss in point.losses]
        assert list(dots.get_xdata()) == [point.num_params for point in points]
        near = np.interp(dots.get_xdata(), curve.get_xdata(), curve.get_ydata())
        np.testing.assert_allclose(near, dots.get_ydata(), rtol=0.01)
        assert star.get_ydata()[0] == pytest.approx(min(curve.get_ydata()), rel=1e-3)
        low, high = interval.get_xdata()
        assert low < star.get_xdata()[0] < high
    names = sorted(path.name for path in plot_fits(fits, tmp_path / "figures"))
    assert names == ["iso_flops_1.png", "iso_flops_1.svg", "scaling.png", "scaling.svg"]

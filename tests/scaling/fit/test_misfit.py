"""Sizes that scatter more than seeds: what is fitted then, and what intervals hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pytest

from factorlm.scaling import LineFit, fit_line
from factorlm.scaling.fit.data import Families, FitWarning, size_means
from factorlm.scaling.fit.misfit import fit_runs_or_sizes

SLOPE = -0.05
SIZES = np.geomspace(1e15, 1e18, 8)
COMPUTE = np.repeat(SIZES, 3)


def drawn(seed: int, of_sizes: float, of_seeds: float = 0.003) -> np.ndarray:
    """Losses of three seeds a size about a straight line, (24,)."""
    draw = np.random.default_rng(seed)
    noise = np.repeat(draw.normal(0, of_sizes, 8), 3) + draw.normal(0, of_seeds, 24)
    return 4 * (COMPUTE / 1e15) ** SLOPE * np.exp(noise)


def lines(families: Families) -> Mapping[str, LineFit]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return {name: fit_line(*points, level=0.9) for name, points in families.items()}


def test_a_size_is_the_geometric_mean_of_its_runs() -> None:
    compute, loss = size_means(np.array([4e3, 1e3, 4e3]), np.array([2.0, 3.0, 8.0]))
    np.testing.assert_allclose(compute, [1e3, 4e3])
    np.testing.assert_allclose(loss, [3.0, 4.0])


def test_runs_are_points_where_seeds_explain_the_scatter() -> None:
    families = {"a": (COMPUTE, drawn(0, 0.0)), "b": (COMPUTE, drawn(1, 0.0))}
    points, fits = fit_runs_or_sizes(families, lines)
    assert points is families
    assert fits["a"].degrees_of_freedom == 24 - 2


def test_sizes_are_the_points_of_all_families_where_one_scatters_more() -> None:
    families = {"a": (COMPUTE, drawn(0, 0.0)), "b": (COMPUTE, drawn(1, 0.02))}
    points, fits = fit_runs_or_sizes(families, lines)
    assert {name: len(loss) for name, (_, loss) in points.items()} == {"a": 8, "b": 8}
    assert {fit.degrees_of_freedom for fit in fits.values()} == {8 - 2}
    whole = lines(families)["b"]
    assert fits["b"].slope == pytest.approx(whole.slope, rel=1e-6)
    assert fits["b"].slope_error > 1.3 * whole.slope_error
    assert not fits["b"].warnings


@pytest.mark.slow
def test_intervals_hold_where_sizes_scatter() -> None:
    covered = {True: [], False: []}
    for seed in range(300):
        families = {"a": (COMPUTE, drawn(seed, 0.01))}
        for is_pooled in covered:
            fit = (fit_runs_or_sizes(families, lines)[1] if is_pooled else lines(families))["a"]
            covered[is_pooled].append(fit.slope_low <= SLOPE <= fit.slope_high)
    assert np.mean(covered[False]) < 0.8
    assert 0.85 <= np.mean(covered[True]) <= 0.95

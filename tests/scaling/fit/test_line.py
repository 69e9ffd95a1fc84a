"""A straight line in log–log against scipy and NumPy, and the coverage of its interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from factorlm.errors import ConfigError
from factorlm.scaling import FitWarning, fit_line

COMPUTE = np.repeat(np.geomspace(1e15, 1e19, 8), 3)
SLOPE, SCALE = -0.055, 20.0


def drawn(seed: int, noise: float = 0.005) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return SCALE * COMPUTE**SLOPE * np.exp(rng.normal(0, noise, len(COMPUTE)))


def test_a_line_is_recovered_from_its_own_points() -> None:
    fit = fit_line(COMPUTE, SCALE * COMPUTE**SLOPE)
    assert fit.slope == pytest.approx(SLOPE, rel=1e-10)
    assert math.exp(fit.intercept) == pytest.approx(SCALE, rel=1e-9)
    np.testing.assert_allclose(fit.predict([1e12, 1e21]), SCALE * np.array([1e12, 1e21]) ** SLOPE)


def test_against_numpy_and_the_textbook() -> None:
    """Slope by polyfit; its standard error from the normal equations."""
    loss = drawn(0)
    fit = fit_line(COMPUTE, loss, level=0.9)
    design = np.stack([np.ones_like(COMPUTE), np.log(COMPUTE)], axis=1)
    best, (squares,), *_ = np.linalg.lstsq(design, np.log(loss), rcond=None)
    variance = squares / (len(loss) - 2)
    error = math.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])
    width = scipy.stats.t.ppf(0.95, len(loss) - 2) * error
    assert fit.intercept == pytest.approx(best[0], rel=1e-9)
    assert fit.slope == pytest.approx(best[1], rel=1e-9)
    assert fit.noise == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert fit.slope_high - fit.slope == pytest.approx(width, rel=1e-6)
    assert fit.slope - fit.slope_low == pytest.approx(width, rel=1e-6)


def test_the_band_is_that_of_the_textbook() -> None:
    loss, places = drawn(1), np.array([1e14, 3e17, 1e20])
    low, high = fit_line(COMPUTE, loss).band(places)
    design = np.stack([np.ones_like(COMPUTE), np.log(COMPUTE)], axis=1)
    best, (squares,), *_ = np.linalg.lstsq(design, np.log(loss), rcond=None)
    at = np.stack([np.ones_like(places), np.log(places)], axis=1)
    leverage = np.einsum("ij,jk,ik->i", at, np.linalg.inv(design.T @ design), at)
    width = scipy.stats.t.ppf(0.975, len(loss) - 2) * np.sqrt(squares / (len(loss) - 2) * leverage)
    np.testing.assert_allclose(np.log(low), at @ best - width, rtol=1e-5)
    np.testing.assert_allclose(np.log(high), at @ best + width, rtol=1e-5)


@pytest.mark.slow
def test_the_interval_covers_the_slope_as_often_as_it_says() -> None:
    fits = [fit_line(COMPUTE, drawn(seed), level=0.9) for seed in range(300)]
    covered = np.mean([fit.slope_low <= SLOPE <= fit.slope_high for fit in fits])
    assert 0.85 <= covered <= 0.95


def test_two_sizes_have_no_interval_and_say_so() -> None:
    with pytest.warns(FitWarning, match="nothing says how sure its slope is"):
        fit = fit_line([1e18, 1e19], [3.0, 2.7])
    assert fit.slope == pytest.approx(math.log(2.7 / 3) / math.log(10))
    assert (fit.slope_low, fit.slope_high) == (-math.inf, math.inf)


@pytest.mark.parametrize("place", [0, 12, 23])
def test_a_run_that_went_wrong_is_said_to_move_the_slope(place: int) -> None:
    """Huber's slope stays by that of the other points; 10 % are twenty standard deviations."""
    loss = drawn(3)
    others = fit_line(np.delete(COMPUTE, place), np.delete(loss, place))
    loss[place] *= 1.1
    with pytest.warns(
        FitWarning, match="over 5 standard deviations off the line of the others: 1 of 24"
    ):
        fit = fit_line(COMPUTE, loss)
    assert fit.robust_slope == pytest.approx(others.slope, abs=2 * others.slope_error)
    assert f"the slope is {fit.robust_slope:.4f}, not {fit.slope:.4f}" in fit.warnings[0]
    if place != 12:
        assert abs(fit.slope - others.slope) > 3 * others.slope_error


def test_noise_and_bends_are_no_runs_that_went_wrong() -> None:
    bent = 1.5 + 2 * (COMPUTE / 1e15) ** -0.15
    for loss in [bent, 1 / bent, *(drawn(seed) for seed in range(20))]:
        assert fit_line(COMPUTE, loss).num_far == 0


def test_a_loss_that_does_not_move_has_no_slope() -> None:
    fit = fit_line([1e18, 1e19, 1e20], [3.0, 3.0, 3.0])
    assert fit.slope == pytest.approx(0, abs=1e-12)
    assert not fit.warnings


def test_through_two_sizes_every_line_goes() -> None:
    with pytest.warns(FitWarning, match="through two sizes a line goes exactly"):
        fit_line([1e18, 1e18, 1e19, 1e19], [3.0, 3.01, 2.7, 2.71])


def test_sizes_that_scatter_more_than_seeds_are_told() -> None:
    """Where they do not, the probability is uniform."""
    assert not any("farther off" in text for text in fit_line(COMPUTE, drawn(4)).warnings)
    chances = [fit_line(COMPUTE, drawn(seed)).misfit_p_value for seed in range(200)]
    assert scipy.stats.kstest(chances, "uniform").pvalue > 0.01
    _, owner = np.unique(COMPUTE, return_inverse=True)
    off = np.random.default_rng(0).normal(0, 0.03, owner.max() + 1)[owner]
    with pytest.warns(FitWarning, match="farther off the line than seeds of one size"):
        fit_line(COMPUTE, drawn(4) * np.exp(off))


def test_every_field_is_a_float_with_a_name() -> None:
    assert all(type(value) is float for value in vars(fit_line(COMPUTE, drawn(2))).values())


@settings(max_examples=50, deadline=None)
@given(unit=st.floats(1e-12, 1e12), nats=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_units_do_not_change_the_slope(unit: float, nats: float, seed: int) -> None:
    """FLOPs or petaflops, nats or bits: the slope and its interval stay."""
    first, second = fit_line(COMPUTE, drawn(seed)), fit_line(COMPUTE * unit, drawn(seed) * nats)
    assert second.slope == pytest.approx(first.slope, rel=1e-6)
    assert second.slope_low == pytest.approx(first.slope_low, rel=1e-6)
    at = second.predict(COMPUTE * unit)
    np.testing.assert_allclose(at, first.predict(COMPUTE) * nats, rtol=1e-8)


@pytest.mark.parametrize(
    ("compute", "loss", "message"),
    [
        ([1e18, 1e18], [3.0, 3.1], "compute has 1 sizes; a straight line needs at least 2"),
        ([1e18, -1.0], [3.0, 2.9], r"compute\[1\]=-1 must be finite and above 0"),
        ([1e18, 1e19], [3.0, math.nan], r"loss\[1\]=nan must be finite and above 0"),
        ([1e18, 1e19], [3.0], "loss has 1 values and compute 2; they must be as many"),
        ([[1e18, 1e19]], [3.0], "compute has 2 dimensions"),
        (["many"], [3.0], r"compute=\['many'\] must be a list of numbers"),
    ],
)
def test_wrong_points_are_named(compute: list, loss: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_line(compute, loss)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_probability(level: float) -> None:
    with pytest.raises(ConfigError, match=f"level={level:g} must be above 0 and below 1"):
        fit_line(COMPUTE, drawn(0), level=level)


def test_equal_losses_are_a_level_line_that_is_sure() -> None:
    fit = fit_line([1e9, 1e10, 1e11], [3.0, 3.0, 3.0])
    assert (fit.slope, fit.slope_low, fit.slope_high) == (0.0, 0.0, 0.0)
    np.testing.assert_allclose(fit.band([1e8, 1e12]), np.full((2, 2), 3.0))

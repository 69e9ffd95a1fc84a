"""E + A·C^−γ against its own points, scipy's curve_fit, and the coverage of its intervals."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from factorlm.errors import ConfigError
from factorlm.scaling import FitWarning, fit_line, fit_power_law, fit_power_laws

COMPUTE = np.repeat(np.geomspace(1e15, 1e19, 8), 3)
E, GAMMA = 1.7, 0.18
A = 2.0 * 1e15**GAMMA


def law(compute: np.ndarray, scale: float = 1.0, gamma: float = GAMMA) -> np.ndarray:
    """Three losses of 3.7 to 2.1 nats at ``scale`` 1."""
    return E + scale * 2.0 * (compute / 1e15) ** -gamma


def noisy(loss: np.ndarray, seed: int, noise: float = 0.005) -> np.ndarray:
    return loss * np.exp(np.random.default_rng(seed).normal(0, noise, len(loss)))


@pytest.mark.parametrize("gamma", [0.05, 0.18, 0.4, 1.0])
def test_a_law_is_recovered_from_its_own_points(gamma: float) -> None:
    fit = fit_power_law(COMPUTE, law(COMPUTE, gamma=gamma))
    assert pytest.approx(E, rel=1e-4) == fit.E
    assert fit.gamma == pytest.approx(gamma, rel=1e-4)
    assert pytest.approx(2.0 * 1e15**gamma, rel=1e-2) == fit.A
    np.testing.assert_allclose(fit.predict(COMPUTE), law(COMPUTE, gamma=gamma), rtol=1e-6)


def test_against_curve_fit() -> None:
    """Plain least squares from the true values: noise without tails leaves nothing to be robust
    against."""
    rng = np.random.default_rng(3)
    loss = law(COMPUTE) * np.exp(rng.uniform(-0.005, 0.005, len(COMPUTE)))
    fit = fit_power_law(COMPUTE, loss)

    def log_law(x: np.ndarray, entropy: float, log_scale: float, gamma: float) -> np.ndarray:
        return np.log(entropy + np.exp(log_scale - gamma * x))

    x = np.log(COMPUTE / 1e15)
    start = [E, math.log(2.0), GAMMA]
    best, covariance = curve_fit(log_law, x, np.log(loss), p0=start)
    error = np.sqrt(np.diag(covariance))
    assert pytest.approx(best[0], abs=0.01 * error[0]) == fit.E
    assert fit.gamma == pytest.approx(best[2], abs=0.01 * error[2])
    width = fit.gamma_high - fit.gamma_low
    assert width == pytest.approx(2 * 2.08 * error[2], rel=0.05)  # t of 21 degrees


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say() -> None:
    """8 sizes, 3 seeds, noise of 0.5 %: 300 draws of a 90 % interval."""
    fits = [fit_power_law(COMPUTE, noisy(law(COMPUTE), seed), level=0.9) for seed in range(300)]
    for name, truth in {"E": E, "gamma": GAMMA, "A": A}.items():
        ends = [(getattr(fit, f"{name}_low"), getattr(fit, f"{name}_high")) for fit in fits]
        covered = np.mean([low <= truth <= high for low, high in ends])
        assert 0.85 <= covered <= 0.95, name


@pytest.mark.slow
def test_intervals_of_a_joint_fit_cover_too() -> None:
    """100 draws of a 90 % interval: 90, give or take 3 σ of 3."""
    hits = np.zeros(3)
    for seed in range(100):
        families = {
            "dense": (COMPUTE, noisy(law(COMPUTE), 2 * seed)),
            "other": (COMPUTE * 0.7, noisy(law(COMPUTE * 0.7, 1.1, 0.2), 2 * seed + 1)),
        }
        dense, other = fit_power_laws(families, level=0.9).values()
        hits += [
            dense.E_low <= E <= dense.E_high,
            dense.gamma_low <= GAMMA <= dense.gamma_high,
            other.gamma_low <= 0.2 <= other.gamma_high,
        ]
    assert np.all((hits >= 81) & (hits <= 99)), hits


def test_one_wild_run_does_not_move_it() -> None:
    """A diverged run, 30 % too high: least squares would move γ by far more than its interval."""
    loss = noisy(law(COMPUTE), 4)
    loss[-1] *= 1.3
    fit = fit_power_law(COMPUTE, loss, level=0.99)
    assert fit.gamma_low <= GAMMA <= fit.gamma_high
    assert fit.gamma == pytest.approx(GAMMA, rel=0.1)
    assert fit.noise < 0.02


def test_a_fixed_entropy_makes_it_a_line() -> None:
    loss = noisy(law(COMPUTE), 5)
    fit = fit_power_law(COMPUTE, loss, E=0.0)
    assert (fit.E, fit.E_low, fit.E_high) == (0.0, 0.0, 0.0)
    assert fit.gamma == pytest.approx(-fit_line(COMPUTE, loss).slope, rel=0.02)
    assert fit_power_law(COMPUTE, law(COMPUTE), E=E).gamma == pytest.approx(GAMMA, rel=1e-6)


def test_gamma_moves_with_entropy_and_the_local_slope_hardly() -> None:
    loss = noisy(law(COMPUTE), 6)
    fits = [fit_power_law(COMPUTE, loss, E=entropy) for entropy in (1.5, 1.9)]
    gammas = [fit.gamma for fit in fits]
    slopes = [fit.local_slope(2.6) for fit in fits]
    assert gammas[1] / gammas[0] > 1.4
    assert slopes[1] / slopes[0] == pytest.approx(1, abs=0.1)


def test_local_slope_is_the_derivative() -> None:
    fit = fit_power_law(COMPUTE, law(COMPUTE))
    at = fit.compute_for(2.5)
    assert float(fit.predict(at)) == pytest.approx(2.5, rel=1e-9)
    ends = np.log(fit.predict([at / 1.001, at * 1.001]))
    assert fit.local_slope(2.5) == pytest.approx(np.diff(ends)[0] / (2 * math.log(1.001)), rel=1e-4)
    assert fit.compute_for(fit.E) == math.inf


def test_families_share_one_entropy() -> None:
    families = {
        "dense": (COMPUTE, noisy(law(COMPUTE), 11)),
        "other": (COMPUTE * 0.7, noisy(law(COMPUTE * 0.7, 1.1, 0.2), 12)),
    }
    fits = fit_power_laws(families, level=0.99)
    assert list(fits) == ["dense", "other"]
    assert fits["dense"].E == fits["other"].E
    for name, gamma in {"dense": GAMMA, "other": 0.2}.items():
        assert fits[name].gamma_low <= gamma <= fits[name].gamma_high
        alone = fit_power_law(*families[name], level=0.99)
        joint = fits[name].gamma_high - fits[name].gamma_low
        assert joint < alone.gamma_high - alone.gamma_low, "two families say more about E than one"


def test_one_family_alone_is_the_plain_fit() -> None:
    loss = noisy(law(COMPUTE), 9)
    (joint,) = fit_power_laws({"dense": (COMPUTE, loss)}).values()
    alone = fit_power_law(COMPUTE, loss)
    assert vars(joint) == pytest.approx(vars(alone), rel=1e-6)


def test_four_points_do_not_identify_three_parameters() -> None:
    with pytest.warns(FitWarning, match="do not identify E and gamma: at 95 %, E is 0 to"):
        fit = fit_power_law([1.69e18, 1.548e19, 7.026e19, 2.094e20], [3.257, 2.907, 2.66, 2.523])
    assert fit.gamma_high > 2 * fit.gamma_low
    assert fit.warnings


def test_a_warning_points_at_the_caller() -> None:
    with pytest.warns(FitWarning) as found:
        fit_power_law([1e18, 1e19, 1e20], [3.3, 2.9, 2.6])
    assert found[0].filename == __file__
    assert "as many parameters as points" in str(found[0].message)


def test_good_data_have_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_power_law(COMPUTE, noisy(law(COMPUTE), 10))
    assert not fit.warnings


def test_every_field_is_a_float_with_a_name() -> None:
    assert all(
        type(value) is float for value in vars(fit_power_law(COMPUTE, law(COMPUTE))).values()
    )


@settings(max_examples=10, deadline=None)
@given(unit=st.floats(1e-6, 1e6), nats=st.floats(0.1, 10), seed=st.integers(0, 20))
def test_units_do_not_change_gamma(unit: float, nats: float, seed: int) -> None:
    loss = noisy(law(COMPUTE), seed)
    first, second = fit_power_law(COMPUTE, loss), fit_power_law(COMPUTE * unit, loss * nats)
    assert second.gamma == pytest.approx(first.gamma, rel=1e-4)
    assert second.gamma_high == pytest.approx(first.gamma_high, rel=1e-3)
    assert pytest.approx(first.E * nats, rel=1e-4) == second.E
    assert pytest.approx(first.A * nats * unit**first.gamma, rel=1e-2) == second.A


@settings(max_examples=15, deadline=None)
@given(loss=st.lists(st.floats(1.0, 5.0), min_size=4, max_size=6))
@pytest.mark.filterwarnings("ignore::factorlm.scaling.FitWarning")
def test_any_losses_have_ordered_intervals(loss: list[float]) -> None:
    """Rising, flat and jagged ones too: the estimate lies in its interval."""
    fit = fit_power_law(np.geomspace(1e15, 1e19, len(loss)), loss)
    assert 0 <= fit.E_low <= fit.E + 1e-6
    assert fit.E_high - fit.E >= -1e-6
    assert fit.gamma_low - 1e-6 <= fit.gamma <= fit.gamma_high + 1e-6


@pytest.mark.parametrize(
    ("compute", "loss", "entropy", "message"),
    [
        ([1e18, 1e19], [3.0, 2.7], None, "compute has 2 sizes; E .* needs at least 3"),
        ([1e18, 1e19, 1e20], [3.0, 2.7, 2.5], 2.5, "E=2.5 must be at least 0 and below the lowest"),
        ([1e18, 1e19, 1e20], [3.0, 2.7, 2.5], -0.1, "E=-0.1 must be at least 0"),
        ([1e18, 1e19, math.inf], [3.0, 2.7, 2.5], None, r"compute\[2\]=inf must be finite"),
    ],
)
def test_refusals(compute: list, loss: list, entropy: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_power_law(compute, loss, E=entropy)


def test_refusals_name_the_family() -> None:
    good = (COMPUTE, law(COMPUTE))
    with pytest.raises(ConfigError, match=r"loss of other\[0\]=0 must be finite and above 0"):
        fit_power_laws({"dense": good, "other": ([1e18, 1e19], [0.0, 2.0])})
    with pytest.raises(ConfigError, match="compute of other has 1 sizes"):
        fit_power_laws({"dense": good, "other": ([1e18], [3.0])})
    with pytest.raises(ConfigError, match="no family has more than 2 sizes"):
        fit_power_laws({"dense": ([1e18, 1e19], [3.0, 2.8])})
    with pytest.raises(ConfigError, match="families is empty"):
        fit_power_laws({})

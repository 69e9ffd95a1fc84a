"""Chinchilla's form: the public coefficients come back, and budgets are spent as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from factorlm.errors import ConfigError
from factorlm.scaling import ChinchillaFit, FitWarning, fit_chinchilla

PUBLIC = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""Hoffmann et al., arXiv 2203.15556, equation 10."""
N, D = (
    grid.ravel() for grid in np.meshgrid(np.geomspace(4e7, 1e10, 6), np.geomspace(1e9, 5e11, 6))
)


def public_loss(num_params: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    return 1.69 + 406.4 * num_params**-0.34 + 410.7 * num_tokens**-0.28


@pytest.fixture(scope="module")
def exact() -> ChinchillaFit:
    return fit_chinchilla(N, D, public_loss(N, D))


def test_the_public_coefficients_are_recovered(exact: ChinchillaFit) -> None:
    for name, value in PUBLIC.items():
        assert getattr(exact, name) == pytest.approx(value, rel=1e-6), name
    np.testing.assert_allclose(exact.predict(N, D), public_loss(N, D), rtol=1e-9)
    assert not exact.warnings


def test_and_lie_in_their_intervals_with_noise() -> None:
    rng = np.random.default_rng(0)
    fit = fit_chinchilla(N, D, public_loss(N, D) * np.exp(rng.normal(0, 0.002, len(N))), level=0.99)
    for name, value in PUBLIC.items():
        low, high = getattr(fit, f"{name}_low"), getattr(fit, f"{name}_high")
        assert low <= value <= high, name
        assert low < getattr(fit, name) < high, name
    assert fit.noise == pytest.approx(0.002, rel=0.4)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = dict.fromkeys(PUBLIC, 0)
    for _ in range(60):
        noisy = public_loss(N, D) * np.exp(rng.normal(0, 0.005, len(N)))
        fit = fit_chinchilla(N, D, noisy, level=0.9)
        for name, value in PUBLIC.items():
            hits[name] += getattr(fit, f"{name}_low") <= value <= getattr(fit, f"{name}_high")
    assert all(0.75 <= count / 60 <= 0.99 for count in hits.values()), hits


@pytest.mark.parametrize("flops", [1e18, 5.76e23])
def test_the_optimal_size_is_the_minimum_of_the_law(exact: ChinchillaFit, flops: float) -> None:
    best = exact.optimal_size(flops)
    assert 6 * best.num_params * best.num_tokens == pytest.approx(flops)
    found = minimize_scalar(
        lambda log_params: float(
            exact.predict(math.exp(log_params), flops / 6 / math.exp(log_params))
        ),
        bounds=(math.log(1e6), math.log(1e13)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert math.log(best.num_params) == pytest.approx(found.x, abs=1e-3)
    assert best.loss == pytest.approx(found.fun, rel=1e-9)


def test_gopher_should_have_been_smaller(exact: ChinchillaFit) -> None:
    """280B parameters on 300B tokens: the law puts a far smaller model below it."""
    best = exact.optimal_size(6 * 280e9 * 300e9)
    assert best.num_params < 280e9 / 4
    assert best.loss < float(exact.predict(280e9, 300e9))


def test_tokens_in_step_with_parameters_are_warned_of() -> None:
    sizes = np.geomspace(1e7, 1e10, 8)
    with pytest.warns(FitWarning, match=r"rise together \(log N and log D have correlation 1.000"):
        fit_chinchilla(sizes, 20 * sizes, public_loss(sizes, 20 * sizes))


def test_every_field_is_a_float_with_a_name(exact: ChinchillaFit) -> None:
    assert all(type(value) is float for value in vars(exact).values())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((N[:4], D[:4], N[:4]), "4 points; E .* needs at least 5"),
        ((N[:6] * 0 + 1e8, D[:6], N[:6]), "num_params has 1 sizes"),
        ((N[:6], D[:6] * 0 + 1e9, N[:6]), "num_tokens has 1 sizes"),
        ((N, -D, N), r"num_tokens\[0\]=-1e\+09 must be finite and above 0"),
    ],
)
def test_refusals(columns: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_chinchilla(*columns)


@pytest.mark.parametrize("flops", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_a_number_of_flops(exact: ChinchillaFit, flops: float) -> None:
    with pytest.raises(ConfigError, match="must be finite, above 0"):
        exact.optimal_size(flops)

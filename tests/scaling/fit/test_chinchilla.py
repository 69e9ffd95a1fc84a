"""Chinchilla's form: the public coefficients come back, and budgets are spent as they say."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import f as f_distribution

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


@pytest.mark.slow
def test_the_interval_of_the_optimal_size_covers_as_often_as_it_says(exact: ChinchillaFit) -> None:
    rng = np.random.default_rng(3)
    flops = 1e21
    true = exact.optimal_size(flops).num_params
    hits = 0
    for _ in range(60):
        fit = fit_chinchilla(
            N, D, public_loss(N, D) * np.exp(rng.normal(0, 0.005, len(N))), level=0.9
        )
        best = fit.optimal_size(flops)
        assert best.num_params_low < best.num_params < best.num_params_high
        assert best.num_tokens_low == pytest.approx(flops / 6 / best.num_params_high)
        assert best.num_tokens_high == pytest.approx(flops / 6 / best.num_params_low)
        hits += best.num_params_low <= true <= best.num_params_high
    assert 0.8 <= hits / 60 <= 0.98


def test_the_interval_is_where_a_fit_held_there_is_as_much_worse_as_chance_allows() -> None:
    """Against the same search by scipy's general minimiser, on the likelihood of normal noise."""
    rng = np.random.default_rng(5)
    loss = public_loss(N, D) * np.exp(np.clip(rng.normal(0, 0.005, len(N)), -0.008, 0.008))
    fit, log_budget = fit_chinchilla(N, D, loss), math.log(1e21 / 6)
    best = fit.optimal_size(1e21)

    def squares(theta: np.ndarray, log_params: float | None) -> float:
        """Of the residuals; with ``log_params``, A is what makes that the best size."""
        E, log_A, log_B, alpha, beta = theta
        if log_params is not None:
            slope = math.log(beta) + log_B - beta * (log_budget - log_params)
            log_A = slope - math.log(alpha) + alpha * log_params
        law = E + np.exp(log_A - alpha * np.log(N)) + np.exp(log_B - beta * np.log(D))
        return float(np.sum((np.log(law) - np.log(loss)) ** 2))

    start = np.array([fit.E, math.log(fit.A), math.log(fit.B), fit.alpha, fit.beta])
    least = squares(start, None)
    threshold = f_distribution.ppf(0.95, 1, len(N) - 5)
    for end in (best.num_params_low, best.num_params_high):
        held = minimize(
            squares,
            start,
            args=(math.log(end),),
            method="Nelder-Mead",
            options={"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-9, "fatol": 1e-14},
        ).fun
        assert (held / least - 1) * (len(N) - 5) == pytest.approx(threshold, rel=0.05)


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
    assert all(type(getattr(exact, field.name)) is float for field in fields(exact))


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

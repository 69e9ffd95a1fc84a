from __future__ import annotations

import numpy as np
import pytest

from factorlm.errors import ConfigError
from factorlm.scaling import fit_line, fit_power_laws, power_law_bands

COMPUTE = np.repeat(np.geomspace(1e12, 1e15, 6), 2)


def drawn(seed: int, entropy: float = 1.5, gamma: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(seed).normal(0, 0.004, len(COMPUTE))
    return COMPUTE, (entropy + 2.0 * (COMPUTE / 1e13) ** -gamma) * np.exp(noise)


def test_without_entropy_and_outliers_it_is_the_band_of_a_line() -> None:
    """At E = 0 the law is a straight line in log–log, whose band is Student's t in closed form."""
    points = drawn(0, entropy=0.0)
    places = np.geomspace(1e11, 1e16, 5)
    low, high = power_law_bands({"a": points}, {"a": places}, E=0.0)["a"]
    expected_low, expected_high = fit_line(*points).band(places)
    np.testing.assert_allclose(low, expected_low, rtol=2e-3)
    np.testing.assert_allclose(high, expected_high, rtol=2e-3)


def test_the_law_lies_in_its_band_which_opens_outside_the_points() -> None:
    families = {"a": drawn(1), "b": drawn(2, gamma=0.2)}
    places = np.array([1e11, 3e13, 1e17])
    bands = power_law_bands(families, dict.fromkeys(families, places))
    fits = fit_power_laws(families)
    for name, (low, high) in bands.items():
        law = fits[name].predict(places)
        assert np.all(low < law)
        assert np.all(law < high)
        width = np.log(high / low)
        assert width[1] < width[0]
        assert width[1] < width[2]


def test_the_true_law_is_in_most_bands() -> None:
    """At one place amid the points, 40 draws of a 90 % band: fewer than 29 has p < 0.001."""
    inside = 0
    for seed in range(40):
        low, high = power_law_bands({"a": drawn(seed)}, {"a": [3e13]}, level=0.9)["a"]
        inside += bool(low[0] < 1.5 + 2.0 * 3.0**-0.15 < high[0])
    assert 29 <= inside <= 40


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"places of a\[0\]=-1 must be finite"):
        power_law_bands({"a": drawn(0)}, {"a": [-1.0]})
    with pytest.raises(ConfigError, match="level=2"):
        power_law_bands({"a": drawn(0)}, {"a": [1e13]}, level=2)

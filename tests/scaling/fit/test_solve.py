"""The solver's derivatives and constants, and the error where scipy lacks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.stats
from scipy.integrate import quad
from scipy.optimize import approx_fprime

from factorlm.errors import ConfigError
from factorlm.scaling import fit_line, fit_power_law
from factorlm.scaling.fit.solve import CLIPPED_VARIANCE, HUBER, Law


def test_jacobian_is_the_derivative_of_the_residuals() -> None:
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], dtype=float)
    law = Law(rng.uniform(30, 40, (2, 6)), mask, rng.uniform(2, 4, 6))
    theta = np.array([1.5, 0.2, 0.4, 0.1, 0.2])
    expected = approx_fprime(theta, law.residuals, 1e-7)
    np.testing.assert_allclose(law.jacobian(theta), expected, atol=1e-5)


def test_the_clipped_variance_is_that_of_a_normal_variable() -> None:
    density = scipy.stats.norm.pdf
    found, _ = quad(lambda x: min(abs(x), HUBER) ** 2 * density(x), -12, 12, points=[-HUBER, HUBER])
    assert found == pytest.approx(CLIPPED_VARIANCE, abs=1e-4)


@pytest.mark.parametrize("fit", [fit_line, fit_power_law])
def test_the_extra_is_named_where_scipy_lacks(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.optimize", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"fits need scipy: pip install 'factorlm\[fit\]'"):
        fit([1e18, 1e19, 1e20], [3.0, 2.7, 2.5])

"""Where a law that shares its E with others may lie: the interval of its loss at each place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from factorlm.scaling.fit.data import as_points, check_level
from factorlm.scaling.fit.power_law import Points, check_families, joint_fit
from factorlm.scaling.fit.solve import Law, Quantity

LEAST_EXCESS = 1e-12
"""Of a loss over E, in nats: its logarithm is taken."""


def power_law_bands(
    families: Mapping[str, Points],
    places: Mapping[str, ArrayLike],
    *,
    E: float | None = None,
    level: float = 0.95,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lowest and highest loss of each law of ``fit_power_laws`` at ``places`` FLOPs of its family.

    Both ends have the shape of the family's places, (num_places,); only families of ``places`` have
    a band. It is the interval of the law at each place by itself, by profile likelihood, with E and
    all other parameters fitted anew. Errors are those of ``fit_power_laws``.
    """
    checked = check_families(families, E)
    check_level(level)
    fitted = joint_fit(checked, E)
    bands = {}
    for name, wanted in places.items():
        (compute,) = as_points(**{f"places of {name}": wanted})
        term = list(checked).index(name)
        ends = [
            fitted.interval(log_loss_at(fitted.law, term, float(place)), level)
            for place in np.log(compute)
        ]
        low, high = np.exp(np.array(ends, dtype=np.float64).reshape(-1, 2)).T
        bands[name] = (low, high)
    return bands


def log_loss_at(law: Law, term: int, log_compute: float) -> Quantity:
    """Logarithm of the loss that one term of a joint law has at one place."""
    scale, gamma = 1 + term, 1 + law.num_terms + term
    distance = log_compute - law.log_center[term]

    def value(theta: np.ndarray) -> float:
        return float(np.log(theta[0] + np.exp(theta[scale] - theta[gamma] * distance)))

    def solve(theta: np.ndarray, log_loss: float) -> float:
        excess = max(float(np.exp(log_loss)) - theta[0], LEAST_EXCESS)
        return float(np.log(excess) + theta[gamma] * distance)

    return Quantity(value=value, index=scale, solve=solve)

"""Whether sizes lie farther off a law than seeds of one size lie from each other.

Intervals take every run as a point of its own. Where sizes scatter more than seeds do, since the
law is another one or they differ in more than compute, the runs of one size say the same thing
several times, and intervals do not hold what they promise. It is the F test of lack of fit (Draper
and Smith, *Applied Regression Analysis*, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

import numpy as np

from factorlm.scaling.fit.data import Families, import_scipy, size_means, size_numbers
from factorlm.scaling.fit.solve import LEAST_NOISE

CHANCE = 0.01
"""What is less likely by the noise of seeds alone is told."""
Spread = tuple[float, int]
"""A sum of squares and its degrees of freedom."""


def spread_of_seeds(families: Iterable[tuple[np.ndarray, np.ndarray]]) -> Spread:
    """Of log(loss) about the mean of its size, over all families (compute, loss)."""
    squares, degrees = 0.0, 0
    for compute, loss in families:
        owner = size_numbers(compute)
        squares += float(np.sum((np.log(loss) - _means(owner, np.log(loss))[owner]) ** 2))
        degrees += len(loss) - int(owner.max()) - 1
    return squares, degrees


def misfit_p_value(
    compute: np.ndarray, residuals: np.ndarray, num_params: int, seeds: Spread
) -> float:
    """Probability that the sizes of one family lie so far off its law by the noise of seeds alone.

    ``compute`` and ``residuals`` of log(loss) are (num_points,). NaN without seeds, and where the
    law has as many parameters as there are sizes.
    """
    owner = size_numbers(compute)
    degrees = int(owner.max()) + 1 - num_params
    squares, seed_degrees = seeds
    if degrees <= 0 or seed_degrees <= 0:
        return float("nan")
    off = np.sum(np.bincount(owner) * _means(owner, residuals) ** 2) / degrees
    ratio = (off + LEAST_NOISE**2) / (squares / seed_degrees + LEAST_NOISE**2)
    return float(import_scipy().stats.f.sf(ratio, degrees, seed_degrees))


def misfit_warning(p_value: float, law: str) -> tuple[str, ...]:
    """What to say of it; nothing where seeds explain it, or where there are none."""
    if not p_value < CHANCE:
        return ()
    return (
        f"sizes lie farther off the {law} than seeds of one size from each other "
        f"(p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'}): it is not their law, or they "
        "differ in more than FLOPs. Intervals and p-values take every run as a point of its own, "
        "and are not to be trusted; those of fits to the mean of each size are",
    )


class HasMisfit(Protocol):
    """A fit of one family."""

    @property
    def misfit_p_value(self) -> float:
        """Probability that seeds explain how far sizes lie off the law; NaN without seeds."""


Fit = TypeVar("Fit", bound=HasMisfit)


def fit_runs_or_sizes(
    families: Families, fit: Callable[[Families], Mapping[str, Fit]]
) -> tuple[Families, Mapping[str, Fit]]:
    """The runs of all families and ``fit`` of them; where sizes of one lie farther off its law than
    seeds explain, the means of all sizes, one point each, and ``fit`` of these.

    Then the scatter of sizes is what intervals are made of, so that they hold.
    """
    fits = fit(families)
    if not any(found.misfit_p_value < CHANCE for found in fits.values()):
        return families, fits
    means = {name: size_means(*points) for name, points in families.items()}
    return means, fit(means)


def _means(owner: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(owner, weights=values) / np.bincount(owner)

"""The compute at which two families have one loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from factorlm.scaling.fit.data import import_scipy
from factorlm.scaling.fit.power_law import exp
from factorlm.scaling.fit.solve import Fitted, Law, Quantity

NUM_PLACES = 17
"""Of the data's range that are tried first."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where two fitted curves meet, in FLOPs, and where they could within the data."""

    compute: float
    """Of the fitted curves, wherever it is; infinite for parallel ones."""
    compute_low: float
    compute_high: float
    """The part of the data's range in which a crossing agrees with the points; NaN for none."""
    data_low: float
    data_high: float
    """The range of compute that both families have."""
    level: float
    """Probability of the interval."""

    @property
    def is_within(self) -> bool:
        """Whether the fitted curves cross within the data."""
        return self.data_low <= self.compute <= self.data_high

    def __str__(self) -> str:
        """``crossing at 3.1e18 FLOPs (95 %: 1.2e18 to 8.0e18)``, or why there is none."""
        interval = f"{100 * self.level:g} %: {self.compute_low:.3g} to {self.compute_high:.3g}"
        if self.is_within:
            return f"crossing at {self.compute:.3g} FLOPs ({interval})"
        if self.data_low > self.data_high:
            return "no crossing within the data, which have no FLOPs in common"
        text = f"no crossing within the data, {self.data_low:.3g} to {self.data_high:.3g} FLOPs"
        if np.isnan(self.compute_low):
            return text
        return f"{text}, though the points do not exclude one ({interval})"


def find_crossing(
    fitted: Fitted, base: int, other: int, *, start: float, stop: float, level: float
) -> Crossing:
    """The crossing of two terms of a joint fit; ``start`` to ``stop`` is where both have data."""
    law, theta = fitted.law, fitted.theta
    quantity = crossing_quantity(law, base, other)
    low, high = _within(fitted, quantity, np.log(start), np.log(stop), level)
    return Crossing(
        compute=exp(quantity.value(theta)),
        compute_low=exp(low),
        compute_high=exp(high),
        data_low=float(start),
        data_high=float(stop),
        level=level,
    )


def crossing_quantity(law: Law, base: int, other: int) -> Quantity:
    """Logarithm of the compute at which two terms are equal."""
    first, second = 1 + law.num_terms + base, 1 + law.num_terms + other
    first_center, second_center = law.log_center[base], law.log_center[other]

    def value(theta: np.ndarray) -> float:
        gap = theta[1 + other] - theta[1 + base]
        gap += theta[second] * second_center - theta[first] * first_center
        turn = theta[second] - theta[first]
        return float(gap / turn) if turn else float("inf")

    def solve(theta: np.ndarray, place: float) -> float:
        of_base = theta[1 + base] - theta[first] * (place - first_center)
        return float(of_base + theta[second] * (place - second_center))

    return Quantity(value=value, index=1 + other, solve=solve)


def _within(
    fitted: Fitted, quantity: Quantity, start: float, stop: float, level: float
) -> tuple[float, float]:
    """First and last place of the range that the interval holds; NaN for none."""
    if fitted.degrees_of_freedom <= 0:
        return start, stop
    if start >= stop:
        return np.nan, np.nan
    places = list(np.linspace(start, stop, NUM_PLACES))
    estimate = quantity.value(fitted.theta)
    if start < estimate < stop:
        places = sorted([*places, estimate])
    excess = [fitted.allows(quantity, place, level) for place in places]
    held = [index for index, value in enumerate(excess) if value <= 0]
    if not held:
        return np.nan, np.nan

    def end(inside: int, outside: int) -> float:
        if not 0 <= outside < len(places):
            return float(places[inside])
        find = import_scipy().optimize.brentq
        pair = sorted([places[inside], places[outside]])
        return float(find(lambda x: fitted.allows(quantity, x, level), *pair, xtol=1e-3))

    return end(held[0], held[0] - 1), end(held[-1], held[-1] + 1)

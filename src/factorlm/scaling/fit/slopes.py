"""Which family is steeper, and how that answer depends on the entropy E."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from factorlm.config import check
from factorlm.errors import did_you_mean
from factorlm.scaling.fit.data import check_level, import_scipy
from factorlm.scaling.fit.power_law import Points, check_families, joint_fit
from factorlm.scaling.fit.solve import Fitted, Law, Quantity

MAX_ENTROPY = 0.95
"""The largest E that is tried, as a share of the lowest loss."""


@dataclass(frozen=True, kw_only=True)
class SlopeDifference:
    """Slopes d log(loss) / d log(compute) of two families at one loss; both are below 0."""

    E: float
    """The entropy that both share; 0 for straight lines."""
    loss: float
    """Where the slopes are taken, in nats; straight lines have one slope everywhere."""
    base_gamma: float
    other_gamma: float
    base_slope: float
    """−``base_gamma`` (1 − ``E`` / ``loss``)."""
    other_slope: float
    difference: float
    """``other_slope`` less ``base_slope``: below 0 the other family is steeper."""
    low: float
    high: float
    level: float
    """Probability of the interval."""
    p_value: float
    """Probability of a difference at least so far from 0 by chance, were there none."""

    @property
    def is_steeper(self) -> bool | None:
        """Whether the other family is; None where the interval holds both answers."""
        return None if self.low <= 0 <= self.high else self.difference < 0


def slopes_over_entropy(
    families: Mapping[str, Points],
    base: str,
    entropies: Iterable[float],
    *,
    level: float = 0.95,
) -> dict[str, tuple[SlopeDifference, ...]]:
    """Every other family's slopes against those of ``base``, at each shared E of ``entropies``.

    The order of slopes can turn with E, so a claim about it holds for a range of E or for none.
    Errors are those of ``compare_lines``.
    """
    found: dict[str, list[SlopeDifference]] = {name: [] for name in families if name != base}
    for E in entropies:
        checked = checked_families(families, base, E, level)
        fitted = joint_fit(checked, E)
        for other, rows in found.items():
            highest, lowest = common_losses(checked[base], checked[other])
            loss = float(np.sqrt(highest * lowest))
            terms = terms_of(checked, base, other)
            rows.append(slopes_of(fitted, *terms, loss=loss, level=level))
    return {name: tuple(rows) for name, rows in found.items()}


def turning_entropy(families: Mapping[str, Points], base: str, other: str) -> float:
    """The least shared E, in nats, at which the order of two slopes turns; NaN for none.

    Only these two families are fitted. Errors are those of ``compare_lines``.
    """
    checked = checked_families(families, base, 0.0, 0.95)
    check(other in families, f"other={other!r} is none of {', '.join(families)}")
    pair = {base: checked[base], other: checked[other]}

    def gap(E: float) -> float:
        gammas = joint_fit(pair, E).theta[-2:]
        return float(gammas[1] - gammas[0])

    largest = MAX_ENTROPY * min(loss.min() for _, loss in pair.values())
    places = np.linspace(0.0, largest, 20)
    gaps = [gap(float(place)) for place in places]
    for left, right in zip(range(len(places)), range(1, len(places)), strict=False):
        if gaps[left] * gaps[right] < 0:
            find = import_scipy().optimize.brentq
            return float(find(gap, places[left], places[right], xtol=1e-4))
    return float("nan")


def checked_families(
    families: Mapping[str, Points], base: str, E: float | None, level: float
) -> dict[str, tuple[np.ndarray, ...]]:
    """The points of all families as arrays; ``ConfigError`` for what cannot be compared."""
    check_level(level)
    known = ", ".join(families)
    check(base in families, f"base={base!r} is none of {known}.{did_you_mean(base, families)}")
    check(len(families) > 1, f"only {base!r} is there; a comparison needs another family")
    return check_families(families, E)


def terms_of(families: Mapping[str, object], base: str, other: str) -> tuple[int, int]:
    """Their terms in the joint law."""
    names = list(families)
    return names.index(base), names.index(other)


def common_losses(
    base: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]
) -> tuple[float, float]:
    """Highest and lowest loss that both have; crosswise where their ranges do not meet."""
    losses = base[1], other[1]
    return float(min(loss.max() for loss in losses)), float(max(loss.min() for loss in losses))


def slopes_of(
    fitted: Fitted, base: int, other: int, *, loss: float, level: float
) -> SlopeDifference:
    """The slopes of two terms of a joint fit at ``loss``."""
    difference = slope_difference(fitted.law, base, other, loss)
    low, high = fitted.interval(difference, level)
    E = float(fitted.theta[0])
    gammas = [float(fitted.theta[1 + fitted.law.num_terms + term]) for term in (base, other)]
    base_slope, other_slope = (-gamma * (1 - E / loss) for gamma in gammas)
    return SlopeDifference(
        E=E,
        loss=loss,
        base_gamma=gammas[0],
        other_gamma=gammas[1],
        base_slope=base_slope,
        other_slope=other_slope,
        difference=other_slope - base_slope,
        low=low,
        high=high,
        level=level,
        p_value=fitted.p_value(difference, 0.0),
    )


def slope_difference(law: Law, base: int, other: int, loss: float) -> Quantity:
    """Local slope of term ``other`` less that of ``base``, each where it has ``loss``."""
    first, second = 1 + law.num_terms + base, 1 + law.num_terms + other

    def reach(theta: np.ndarray) -> float:
        return max(1 - theta[0] / loss, 1e-9)

    return Quantity(
        value=lambda theta: float((theta[first] - theta[second]) * reach(theta)),
        index=second,
        solve=lambda theta, value: theta[first] - value / reach(theta),
    )

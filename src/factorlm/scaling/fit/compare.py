"""Families of models against each other: slopes, FLOPs for equal loss, where they cross."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from factorlm.config import check
from factorlm.errors import did_you_mean
from factorlm.scaling.fit.crossing import Crossing, find_crossing
from factorlm.scaling.fit.data import check_level
from factorlm.scaling.fit.power_law import Points, check_families, exp, joint_fit
from factorlm.scaling.fit.solve import Fitted, Law, Quantity
from factorlm.scaling.fit.split import SlopeSplit, have_same_sizes, split_slopes

NUM_LOSSES = 5
"""Along the range of losses that both families have."""


@dataclass(frozen=True, kw_only=True)
class ComputeMultiplier:
    """What two families spend for one loss."""

    loss: float
    """In nats."""
    base_flops: float
    other_flops: float
    multiplier: float
    """``base_flops`` by ``other_flops``: above 1 the other family needs fewer."""
    multiplier_low: float
    multiplier_high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One family against another; slopes are d log(loss) / d log(compute), below 0."""

    base: str
    other: str
    E: float
    """The entropy that both share; 0 for straight lines."""
    level: float
    """Probability of the intervals."""
    reference_loss: float
    """Where the slopes are taken, in nats; straight lines have one slope everywhere."""
    base_slope: float
    other_slope: float
    slope_difference: float
    """``other_slope`` less ``base_slope``: below 0 the other family is steeper."""
    slope_difference_low: float
    slope_difference_high: float
    p_value: float
    """Probability of a difference at least so far from 0 by chance, were there none."""
    multipliers: tuple[ComputeMultiplier, ...]
    """From the highest loss to the lowest that both families have; empty where none."""
    crossing: Crossing
    split: SlopeSplit | None
    """Only for straight lines through equally many sizes."""

    @property
    def is_steeper(self) -> bool | None:
        """Whether the other family is, None where the interval holds both answers."""
        if self.slope_difference_low <= 0 <= self.slope_difference_high:
            return None
        return self.slope_difference < 0


def compare_lines(
    families: Mapping[str, Points], base: str, *, level: float = 0.95
) -> dict[str, Comparison]:
    """Every other family against ``base``, by straight lines in log–log.

    The lines are fitted by least squares and their noise is taken to be of one size over all
    families: slope differences have Student's t, crossings Fieller's interval. Sizes are paired in
    order of compute for the split. Raises ``ConfigError`` as ``fit_power_laws`` does, and for an
    unknown ``base``.
    """
    checked = _checked(families, base, 0.0, level)
    fitted = joint_fit(checked, 0.0, is_robust=False)
    found = {}
    for other in checked:
        if other != base:
            paired = have_same_sizes(checked[base], checked[other])
            split = split_slopes(checked[base], checked[other], level) if paired else None
            found[other] = _compare(fitted, checked, base, other, level, split)
    return found


def compare_power_laws(
    families: Mapping[str, Points], base: str, *, E: float | None = None, level: float = 0.95
) -> dict[str, Comparison]:
    """Every other family against ``base``, by power laws that share one ``E``, fitted or given.

    Intervals and p-values are by profile likelihood, ``E`` and all other parameters fitted anew.
    Errors are those of ``compare_lines``.
    """
    checked = _checked(families, base, E, level)
    fitted = joint_fit(checked, E)
    others = (name for name in checked if name != base)
    return {other: _compare(fitted, checked, base, other, level, None) for other in others}


def _checked(
    families: Mapping[str, Points], base: str, E: float | None, level: float
) -> dict[str, tuple[np.ndarray, ...]]:
    check_level(level)
    known = ", ".join(families)
    check(base in families, f"base={base!r} is none of {known}.{did_you_mean(base, families)}")
    check(len(families) > 1, f"only {base!r} is there; a comparison needs another family")
    return check_families(families, E)


def _compare(
    fitted: Fitted,
    families: Mapping[str, tuple[np.ndarray, ...]],
    base: str,
    other: str,
    level: float,
    split: SlopeSplit | None,
) -> Comparison:
    names = list(families)
    terms = names.index(base), names.index(other)
    lowest = max(families[name][1].min() for name in (base, other))
    highest = min(families[name][1].max() for name in (base, other))
    losses = np.geomspace(highest, lowest, NUM_LOSSES) if lowest < highest else []
    reference = float(np.sqrt(lowest * highest))
    difference = slope_difference(fitted.law, *terms, reference)
    low, high = fitted.interval(difference, level)
    start = max(families[name][0].min() for name in (base, other))
    stop = min(families[name][0].max() for name in (base, other))
    slopes = [_slope(fitted, term, reference) for term in terms]
    return Comparison(
        base=base,
        other=other,
        E=float(fitted.theta[0]),
        level=level,
        reference_loss=reference,
        base_slope=slopes[0],
        other_slope=slopes[1],
        slope_difference=slopes[1] - slopes[0],
        slope_difference_low=low,
        slope_difference_high=high,
        p_value=fitted.p_value(difference, 0.0),
        multipliers=tuple(_multiplier(fitted, *terms, float(loss), level) for loss in losses),
        crossing=find_crossing(fitted, *terms, start=start, stop=stop, level=level),
        split=split,
    )


def _slope(fitted: Fitted, term: int, loss: float) -> float:
    gamma = fitted.theta[1 + fitted.law.num_terms + term]
    return float(-gamma * (1 - fitted.theta[0] / loss))


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


def _multiplier(
    fitted: Fitted, base: int, other: int, loss: float, level: float
) -> ComputeMultiplier:
    law, theta = fitted.law, fitted.theta
    ratio = Quantity(
        value=lambda theta: (
            log_compute_for(law, theta, base, loss) - log_compute_for(law, theta, other, loss)
        ),
        index=1 + other,
        solve=partial(_scale_for_ratio, law, base, other, loss),
    )
    low, high = fitted.interval(ratio, level)
    base_log, other_log = (log_compute_for(law, theta, term, loss) for term in (base, other))
    return ComputeMultiplier(
        loss=loss,
        base_flops=exp(base_log),
        other_flops=exp(other_log),
        multiplier=exp(base_log - other_log),
        multiplier_low=exp(low),
        multiplier_high=exp(high),
    )


def _scale_for_ratio(
    law: Law, base: int, other: int, loss: float, theta: np.ndarray, ratio: float
) -> float:
    """log a of ``other`` at which it needs e^−ratio of what ``base`` does."""
    log_compute = log_compute_for(law, theta, base, loss) - ratio
    gamma = theta[1 + law.num_terms + other]
    return float(_log_excess(theta, loss) + gamma * (log_compute - law.log_center[other]))


def log_compute_for(law: Law, theta: np.ndarray, term: int, loss: float) -> float:
    """Logarithm of the FLOPs at which ``term`` has ``loss``."""
    gamma = max(theta[1 + law.num_terms + term], 1e-9)
    return float(law.log_center[term] + (theta[1 + term] - _log_excess(theta, loss)) / gamma)


def _log_excess(theta: np.ndarray, loss: float) -> float:
    return float(np.log(max(loss - theta[0], 1e-12)))

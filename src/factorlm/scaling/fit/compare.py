"""Families of models against each other: slopes, FLOPs for equal loss, where they cross."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from factorlm.scaling.fit.crossing import Crossing, find_crossing
from factorlm.scaling.fit.power_law import Points, exp, joint_fit
from factorlm.scaling.fit.slopes import (
    SlopeDifference,
    checked_families,
    common_losses,
    slopes_of,
    terms_of,
)
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
    """One family against another."""

    base: str
    other: str
    slopes: SlopeDifference
    multipliers: tuple[ComputeMultiplier, ...]
    """From the highest loss to the lowest that both families have; empty where none, and where
    the loss of one does not fall."""
    crossing: Crossing
    split: SlopeSplit | None
    """Only for straight lines through equally many sizes."""


def compare_lines(
    families: Mapping[str, Points], base: str, *, level: float = 0.95
) -> dict[str, Comparison]:
    """Every other family against ``base``, by straight lines in log–log.

    The lines are fitted by least squares and their noise is taken to be of one size over all
    families: slope differences have Student's t, crossings Fieller's interval. Sizes are paired in
    order of compute for the split. Raises ``ConfigError`` as ``fit_power_laws`` does, and for an
    unknown ``base``.
    """
    checked = checked_families(families, base, 0.0, level)
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
    checked = checked_families(families, base, E, level)
    fitted = joint_fit(checked, E)
    others = (name for name in checked if name != base)
    return {other: _compare(fitted, checked, base, other, level, None) for other in others}


def _compare(
    fitted: Fitted,
    families: Mapping[str, tuple[np.ndarray, ...]],
    base: str,
    other: str,
    level: float,
    split: SlopeSplit | None,
) -> Comparison:
    terms = terms_of(families, base, other)
    highest, lowest = common_losses(families[base], families[other])
    exponents = fitted.theta[1 + fitted.law.num_terms :][list(terms)]
    has_multipliers = lowest < highest and bool(np.all(exponents > 0))
    losses = np.geomspace(highest, lowest, NUM_LOSSES if has_multipliers else 0)
    start = max(families[name][0].min() for name in (base, other))
    stop = min(families[name][0].max() for name in (base, other))
    return Comparison(
        base=base,
        other=other,
        slopes=slopes_of(fitted, *terms, loss=float(np.sqrt(highest * lowest)), level=level),
        multipliers=tuple(_multiplier(fitted, *terms, float(loss), level) for loss in losses),
        crossing=find_crossing(fitted, *terms, start=start, stop=stop, level=level),
        split=split,
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

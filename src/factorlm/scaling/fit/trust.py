"""How far a fit can be trusted: what it predicts of a size left out, and the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.scaling.fit.data import as_points, check_level, check_sizes, size_numbers
from factorlm.scaling.fit.line import fit_line
from factorlm.scaling.fit.power_law import Points, check_families, fit_power_law, fit_power_laws
from factorlm.scaling.fit.solve import Fitted, Law

MIN_SIZES = 8
MIN_SEEDS = 3
"""Of each size: fewer make a bootstrap's interval far too narrow."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The largest size as predicted from all smaller ones."""

    size: float
    """The largest value of the law's first variable: FLOPs, or parameters."""
    measured: float
    """Its loss in nats, the geometric mean over its runs."""
    predicted: float
    error: float
    """``predicted`` / ``measured`` less 1."""


def hold_out_largest(fit: Callable[..., Any], *columns: ArrayLike) -> HeldOut:
    """Fit without the largest size and predict it.

    ``fit`` is ``fit_line``, ``fit_power_law`` or ``fit_chinchilla`` and ``columns`` its arguments,
    the loss last; a size is a value of the first, or several nearly equal ones.
    Errors are those of ``fit``.
    """
    names = [f"column {number}" for number in range(1, len(columns))]
    *variables, loss = as_points(**dict(zip([*names, "loss"], columns, strict=True)))
    is_last = _is_largest(variables[0])
    kept = [column[~is_last] for column in (*variables, loss)]
    check(len(kept[0]) > 0, "there is one size only; a held-out check needs more")
    law = fit(*kept)
    return _held_out(law, [column[is_last] for column in variables], loss[is_last])


def hold_out_largest_of(
    families: Mapping[str, Points], *, E: float | None = None
) -> dict[str, HeldOut]:
    """As ``hold_out_largest``, with ``fit_power_laws``: every family is without its largest."""
    checked = check_families(families, E)
    last = {name: _is_largest(compute) for name, (compute, _) in checked.items()}
    kept = {name: (c[~last[name]], loss[~last[name]]) for name, (c, loss) in checked.items()}
    fits = fit_power_laws(kept, E=E)
    return {
        name: _held_out(fits[name], [compute[last[name]]], loss[last[name]])
        for name, (compute, loss) in checked.items()
    }


def _is_largest(values: np.ndarray) -> np.ndarray:
    """Which of ``values`` are of the largest size, both (num_points,)."""
    numbers = size_numbers(values)
    return numbers == numbers.max()


def _held_out(law: Any, variables: list[np.ndarray], loss: np.ndarray) -> HeldOut:
    predicted = float(np.exp(np.mean(np.log(law.predict(*variables)))))
    measured = float(np.exp(np.mean(np.log(loss))))
    return HeldOut(
        size=float(variables[0].max()),
        measured=measured,
        predicted=predicted,
        error=predicted / measured - 1,
    )


def bootstrap(
    fit: Callable[..., Any],
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    level: float = 0.95,
    num_draws: int = 500,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Intervals that do not take the noise to be normal: name of a parameter to (low, high).

    ``fit`` is ``fit_line`` or ``fit_power_law``. Residuals of log(loss), widened by √(n/(n − p)),
    are drawn anew ``num_draws`` times and the law is fitted to each; the interval lies between the
    quantiles (Efron and Tibshirani, *An Introduction to the Bootstrap*, chapters 9 and 13). Raises
    ``ConfigError`` below 8 sizes or 3 seeds of a size, where it would be far too narrow.
    """
    compute, loss = as_points(compute=compute, loss=loss)
    check_level(level)
    check_sizes("compute", compute, MIN_SIZES, "a bootstrap")
    seeds = int(np.bincount(size_numbers(compute)).min())
    check(seeds >= MIN_SEEDS, f"a size has {seeds} seeds; a bootstrap needs at least {MIN_SEEDS}")
    check(num_draws >= 100, f"num_draws={num_draws} must be at least 100")
    names, estimate, law = _estimator(fit, compute, loss)
    residuals = np.log(loss) - np.log(law)
    residuals *= np.sqrt(len(loss) / (len(loss) - len(names)))
    draw = np.random.default_rng(seed)
    found = [estimate(law * np.exp(draw.choice(residuals, len(loss)))) for _ in range(num_draws)]
    ends = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, *ends, strict=True)}


def _estimator(
    fit: Callable[..., Any], compute: np.ndarray, loss: np.ndarray
) -> tuple[list[str], Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Names of the parameters, losses to parameters without intervals, and the fitted losses."""
    log_compute = np.log(compute)
    if fit is fit_line:
        slope, intercept = np.polyfit(log_compute, np.log(loss), 1)
        return (
            ["slope", "intercept"],
            lambda drawn: np.polyfit(log_compute, np.log(drawn), 1),
            np.exp(intercept + slope * log_compute),
        )
    if fit is not fit_power_law:
        raise ConfigError("a bootstrap is for fit_line and fit_power_law")
    mask = np.ones((1, len(loss)))
    first = Fitted(Law(log_compute[None], mask, loss))

    def estimate(drawn: np.ndarray) -> np.ndarray:
        theta = Fitted(Law(log_compute[None], mask, drawn), start=first.theta).theta
        log_scale = theta[1] + theta[2] * first.law.log_center[0]
        return np.array([theta[0], np.exp(log_scale), theta[2]])

    return ["E", "A", "gamma"], estimate, first.law.predict(first.theta)

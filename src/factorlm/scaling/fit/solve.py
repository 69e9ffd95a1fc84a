"""Sums of power laws fitted by robust least squares, with profile-likelihood intervals.

Every law here is loss = E + Σ_k m_k · a_k · (x_k / c_k)^−γ_k, with m_k 1 for the points that have
term k: one term for E + A·C^−γ, a term a family where families share E, two terms for Chinchilla's.
The parameters are one array ``theta`` (1 + 2K,): E, then log a_k, then γ_k. The centers c_k lie
amid the points, where a_k and γ_k hardly depend on each other; A_k = a_k · c_k^γ_k.

Residuals are log(law) − log(loss), under Huber's loss (Hoffmann et al., arXiv 2203.15556, approach
3). Its threshold is ``HUBER`` times their standard deviation, estimated with it (Proposal 2 of
Huber, *Robust Statistics*), which costs 1 % of precision where the noise is normal.

An interval holds the values v at which fitting the other parameters anew makes the objective D no
worse than chance would: with D(v) − D the drop, F = 2 (D(v) − D) / λ and λ = [Σψ²/(n − p)] /
mean(ψ'), the values with F under the quantile of F(1, n − p). It is the likelihood ratio test for
robust fits (Schrader and Hettmansperger, Biometrika 67, 1980). With no residual beyond the
threshold it is the profile likelihood of normal noise, and on a line Student's t.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from factorlm.scaling.fit.data import import_scipy

HUBER = 2.0
"""Threshold in standard deviations."""
CLIPPED_VARIANCE = 0.9205
"""Of a standard normal variable that is clipped at ``HUBER``."""
MAX_ROUNDS = 20
"""Of moving the threshold."""
MAX_EXPONENT = 10.0
EXPONENTS = np.geomspace(0.02, 1.5, 12)
"""Where the search for one exponent starts."""
PAIRED_EXPONENTS = np.geomspace(0.1, 1.2, 6)
"""Where the search for two exponents starts, each with each."""
NUM_STARTS = 6
"""The best of the starts are followed to their minimum."""
LEAST_SCALE = 1e-4
"""Of a term amid the points, relative to the largest loss."""
LEAST_NOISE = 1e-6
"""Relative; data without any noise are taken to have this much, some digits of a float32 loss."""
MAX_STEPS = 40
"""Doublings of the search for the end of an interval."""

Pin = tuple[int, Callable[[np.ndarray], float]]
"""A parameter that is not free, and its value given the others."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number that the parameters imply, with one parameter solved for."""

    value: Callable[[np.ndarray], float]
    index: int
    """Of the parameter in ``theta``."""
    solve: Callable[[np.ndarray, float], float]
    """That parameter, given the others and a value of the quantity."""
    low: float = -np.inf
    high: float = np.inf
    """What values there are."""

    @classmethod
    def parameter(cls, index: int, low: float = -np.inf, high: float = np.inf) -> Quantity:
        """One parameter itself."""
        return cls(
            value=lambda theta: float(theta[index]),
            index=index,
            solve=lambda theta, value: value,
            low=low,
            high=high,
        )

    @classmethod
    def log_scale(cls, law: Law, term: int) -> Quantity:
        """log A of one term."""
        index, exponent, center = 1 + term, 1 + law.num_terms + term, law.log_center[term]
        return cls(
            value=lambda theta: float(theta[index] + theta[exponent] * center),
            index=index,
            solve=lambda theta, value: value - theta[exponent] * center,
        )

    def pin(self, value: float) -> Pin:
        """Hold the quantity at ``value``."""
        return self.index, lambda theta: self.solve(theta, value)


class Law:
    """A sum of power laws and the points that it is fitted to."""

    def __init__(
        self, log_x: np.ndarray, mask: np.ndarray, loss: np.ndarray, *, may_rise: bool = False
    ) -> None:
        """``log_x`` and ``mask`` (num_terms, num_points), ``loss`` (num_points,); with ``may_rise``
        exponents can be below 0."""
        self.least_exponent = -MAX_EXPONENT if may_rise else 0.0
        self.log_center = log_x.mean(axis=1)
        self.log_x = log_x - self.log_center[:, None]
        self.mask = mask
        self.loss = loss
        self.num_terms = len(log_x)

    def predict(self, theta: np.ndarray) -> np.ndarray:
        """Loss at the points, (num_points,)."""
        log_scale, exponents = np.split(theta[1:], 2)
        logs = log_scale[:, None] - exponents[:, None] * self.log_x
        return theta[0] + np.sum(self.mask * np.exp(np.minimum(logs, 600.0)), axis=0)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Of the logarithms, (num_points,)."""
        return np.log(np.maximum(self.predict(theta), 1e-300)) - np.log(self.loss)

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """Derivatives of ``residuals``, (num_points, parameters)."""
        log_scale, exponents = np.split(theta[1:], 2)
        logs = log_scale[:, None] - exponents[:, None] * self.log_x
        terms = self.mask * np.exp(np.minimum(logs, 600.0))
        rows = np.vstack([np.ones_like(self.loss), terms, -terms * self.log_x])
        return (rows / np.maximum(theta[0] + terms.sum(axis=0), 1e-300)).T

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Of ``theta``."""
        count, largest = self.num_terms, self.loss.max()
        least = (0.0, np.log(LEAST_SCALE * largest), self.least_exponent)
        low = np.repeat(least, [1, count, count])
        high = np.repeat([largest, np.log(10 * largest), MAX_EXPONENT], [1, count, count])
        return low, high

    def inside(self, theta: np.ndarray) -> np.ndarray:
        """``theta`` or the nearest one off the bounds, from which the solver hardly gets away."""
        low, high = self.bounds()
        margin = np.repeat([0.02 * high[0], 0.01, 0.001], [1, self.num_terms, self.num_terms])
        return np.clip(theta, low + margin, high - margin)

    def starts(self, exponents: Iterable[Sequence[float]], E: float | None) -> list[np.ndarray]:
        """The best ``NUM_STARTS``: for given exponents the rest is linear, and not negative."""
        found = [self._start(np.asarray(chosen), E) for chosen in exponents]
        found.sort(key=lambda pair: pair[0])
        return [theta for _, theta in found[:NUM_STARTS]]

    def _start(self, exponents: np.ndarray, E: float | None) -> tuple[float, np.ndarray]:
        terms = self.mask * np.exp(-exponents[:, None] * self.log_x)
        rows = terms if E is not None else np.vstack([np.ones_like(self.loss), terms])
        scales, error = import_scipy().optimize.nnls(
            (rows / self.loss).T, (self.loss - (E or 0.0)) / self.loss
        )
        entropy, scales = (E, scales) if E is not None else (scales[0], scales[1:])
        log_scale = np.log(np.maximum(scales, LEAST_SCALE * self.loss.max()))
        return float(error), np.concatenate([[entropy], log_scale, exponents])


class Fitted:
    """The best ``theta`` of a law, and how far its parameters could be from it."""

    def __init__(
        self,
        law: Law,
        *,
        E: float | None = None,
        is_robust: bool = True,
        start: np.ndarray | None = None,
    ) -> None:
        """Fit with ``E`` free, or fixed, from many starts or from ``start``; without ``is_robust``
        by plain least squares."""
        self.law = law
        self.pins: list[Pin] = [] if E is None else [(0, lambda theta: E)]
        self.degrees_of_freedom = len(law.loss) - (1 + 2 * law.num_terms - len(self.pins))
        self.threshold = np.inf
        self.noise = 0.0
        self.theta, self.cost = self._first(E) if start is None else self._minimise(start)
        if is_robust and self.degrees_of_freedom > 0:
            self._make_robust()
        self.scale = self._scale()
        if not is_robust:
            self.noise = float(np.sqrt(self.scale))

    def interval(self, quantity: Quantity, level: float) -> tuple[float, float]:
        """The ``level`` interval of ``quantity``; all that it could be where nothing is free."""
        if self.degrees_of_freedom <= 0:
            return quantity.low, quantity.high
        limit = np.sqrt(import_scipy().stats.f.ppf(level, 1, self.degrees_of_freedom))
        return self._end(quantity, limit, -1.0), self._end(quantity, limit, 1.0)

    def p_value(self, quantity: Quantity, value: float) -> float:
        """Probability of a fit as far from ``value`` by chance alone; NaN where nothing is free."""
        if self.degrees_of_freedom <= 0:
            return float("nan")
        drop = self._root_drop(quantity, value, self.theta)[0] ** 2
        return float(import_scipy().stats.f.sf(drop, 1, self.degrees_of_freedom))

    def allows(self, quantity: Quantity, value: float, level: float) -> float:
        """Below 0 where ``value`` is in the ``level`` interval, above 0 where it is not."""
        limit = np.sqrt(import_scipy().stats.f.ppf(level, 1, self.degrees_of_freedom))
        return self._root_drop(quantity, value, self.theta)[0] - limit

    def _first(self, E: float | None) -> tuple[np.ndarray, float]:
        grid: Iterable[Any] = itertools.product(PAIRED_EXPONENTS, repeat=self.law.num_terms)
        if self.law.num_terms != 2 or not self.law.mask.all():
            grid = ([exponent] * self.law.num_terms for exponent in EXPONENTS)
        starts = self.law.starts(grid, E)
        return min((self._minimise(start) for start in starts), key=lambda pair: pair[1])

    def _make_robust(self) -> None:
        """Move the threshold with the spread of the residuals until both agree (Proposal 2)."""
        for _ in range(MAX_ROUNDS):
            before = self.threshold
            squares = np.sum(self._clipped() ** 2) / (CLIPPED_VARIANCE * self.degrees_of_freedom)
            self.noise = max(float(np.sqrt(squares)), LEAST_NOISE)
            self.threshold = HUBER * self.noise
            self.theta, self.cost = self._minimise(self.theta)
            if abs(self.threshold - before) < 0.01 * self.threshold:
                break

    def _clipped(self) -> np.ndarray:
        return np.clip(self.law.residuals(self.theta), -self.threshold, self.threshold)

    def _scale(self) -> float:
        """λ of the module's docstring: the variance of normal noise."""
        clipped = self._clipped()
        inside = np.mean(np.abs(clipped) < self.threshold)
        variance = np.sum(clipped**2) / max(self.degrees_of_freedom, 1)
        return max(float(variance / max(inside, 0.1)), LEAST_NOISE**2)

    def _minimise(self, start: np.ndarray, *more: Pin) -> tuple[np.ndarray, float]:
        """The nearest minimum over the parameters that no pin holds."""
        pins = [*self.pins, *more]
        free = np.setdiff1d(np.arange(len(start)), [index for index, _ in pins])
        low, high = self.law.bounds()

        def whole(part: np.ndarray) -> np.ndarray:
            theta = start.copy()
            theta[free] = part
            for index, value in pins:
                theta[index] = value(theta)
            return theta

        def jacobian(part: np.ndarray) -> np.ndarray:
            theta = whole(part)
            return self.law.jacobian(theta) @ _slopes(lambda at: whole(at[free]), theta)[:, free]

        robust = {} if np.isinf(self.threshold) else {"loss": "huber", "f_scale": self.threshold}
        found = import_scipy().optimize.least_squares(
            lambda part: self.law.residuals(whole(part)),
            self.law.inside(start)[free],
            jac=jacobian,
            bounds=(low[free], high[free]),
            x_scale="jac",
            ftol=1e-8,
            xtol=1e-8,
            gtol=1e-12,
            max_nfev=200,
            **robust,
        )
        return whole(found.x), float(found.cost)

    def _root_drop(
        self, quantity: Quantity, value: float, start: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """√F at ``value``, and the parameters there."""
        theta, cost = self._minimise(start, quantity.pin(value))
        return float(np.sqrt(max(0.0, 2 * (cost - self.cost) / self.scale))), theta

    def _end(self, quantity: Quantity, limit: float, side: float) -> float:
        """Where √F passes ``limit`` on one side of the estimate; its bound where it never does."""
        bound = quantity.high if side > 0 else quantity.low
        inner, inner_root, theta = quantity.value(self.theta), 0.0, self.theta
        step = self._standard_error(quantity) * limit
        for _ in range(MAX_STEPS):
            outer = inner + side * step
            if (outer - bound) * side >= 0:
                outer = bound
            if outer == inner:
                return bound
            outer_root, found = self._root_drop(quantity, outer, theta)
            if outer_root > limit:
                known = {inner: inner_root - limit, outer: outer_root - limit}
                return self._crossing(quantity, limit, known, theta)
            if outer == bound:
                return bound
            inner, inner_root, theta, step = outer, outer_root, found, 2 * step
        return side * np.inf if np.isinf(bound) else bound

    def _crossing(
        self, quantity: Quantity, limit: float, known: dict[float, float], theta: np.ndarray
    ) -> float:
        """Where √F equals ``limit`` between two values whose excess over it is known."""

        def excess(value: float) -> float:
            if value not in known:
                known[value] = self._root_drop(quantity, value, theta)[0] - limit
            return known[value]

        inner, outer = known
        width = 2e-3 * abs(outer - inner)
        return float(import_scipy().optimize.brentq(excess, inner, outer, xtol=width))

    def _standard_error(self, quantity: Quantity) -> float:
        """By the curvature at the minimum; only where to look first."""
        free = np.setdiff1d(np.arange(len(self.theta)), [index for index, _ in self.pins])
        jacobian = self.law.jacobian(self.theta)[:, free]
        gradient = _slopes(lambda theta: np.array([quantity.value(theta)]), self.theta)[0, free]
        covariance = np.linalg.pinv(jacobian.T @ jacobian) * self.scale
        error = float(np.sqrt(max(gradient @ covariance @ gradient, 0.0)))
        return max(error, 1e-9 * max(abs(quantity.value(self.theta)), 1e-9))


def _slopes(function: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> np.ndarray:
    """Derivatives of ``function`` by each parameter, (values, parameters)."""
    steps = 1e-6 * np.maximum(np.abs(theta), 1e-3)
    columns = [
        (function(theta + step * axis) - function(theta - step * axis)) / (2 * step)
        for step, axis in zip(steps, np.eye(len(steps)), strict=True)
    ]
    return np.stack(columns, axis=1)

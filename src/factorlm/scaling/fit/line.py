"""A straight line in log–log: the simplest law, and all that a few sizes can tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from factorlm.scaling.fit.data import as_points, check_level, check_sizes, import_scipy, warn_user


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """log(loss) = ``intercept`` + ``slope`` · log(compute), natural logarithms.

    It is the law A·C^−γ, without the entropy E, with γ = −``slope`` and A = exp(``intercept``).
    """

    slope: float
    slope_low: float
    slope_high: float
    """The interval of ``slope`` by Student's t."""
    intercept: float
    level: float
    """Probability of the intervals."""
    noise: float
    """Standard deviation of log(loss) about the line."""
    degrees_of_freedom: float
    """Points less two."""
    center_compute: float
    """Geometric mean of the compute: where the line is known best, in FLOPs."""
    slope_error: float
    """Standard error of ``slope``."""

    def predict(self, compute: ArrayLike) -> np.ndarray:
        """Loss at ``compute`` FLOPs, of the same shape."""
        return np.exp(self.intercept + self.slope * np.log(np.asarray(compute, dtype=np.float64)))

    def band(self, compute: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest loss that the line may have at ``compute``, of the same shape.

        It is the interval of the line at each place by itself, by Student's t.
        """
        distance = np.log(np.asarray(compute, dtype=np.float64) / self.center_compute)
        num_points = self.degrees_of_freedom + 2
        error = np.hypot(self.noise / np.sqrt(num_points), self.slope_error * distance)
        width = np.exp(t_quantile(self.level, self.degrees_of_freedom) * error)
        return self.predict(compute) / width, self.predict(compute) * width

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the points cannot tell, in plain words."""
        if self.degrees_of_freedom:
            return ()
        return ("two points have no spread about their line: nothing says how sure its slope is",)


def fit_line(compute: ArrayLike, loss: ArrayLike, *, level: float = 0.95) -> LineFit:
    """Fit log(loss) to log(compute) by least squares.

    ``compute`` (num_points,) in FLOPs and ``loss`` (num_points,) in nats; runs of one size with
    different seeds are points of their own. Raises ``ConfigError`` for fewer than two sizes and
    for values that are not finite and above 0.
    """
    compute, loss = as_points(compute=compute, loss=loss)
    check_sizes("compute", compute, 2, "a straight line")
    check_level(level)
    log_compute, log_loss = np.log(compute), np.log(loss)
    line = import_scipy().stats.linregress(log_compute, log_loss)
    degrees = len(compute) - 2
    residuals = log_loss - line.intercept - line.slope * log_compute
    error = float(np.nan_to_num(line.stderr))  # NaN where all losses are equal
    width = t_quantile(level, degrees) * error if degrees else np.inf
    fit = LineFit(
        slope=float(line.slope),
        slope_low=float(line.slope - width),
        slope_high=float(line.slope + width),
        intercept=float(line.intercept),
        level=float(level),
        noise=float(np.sqrt(np.sum(residuals**2) / degrees)) if degrees else 0.0,
        degrees_of_freedom=float(degrees),
        center_compute=float(np.exp(log_compute.mean())),
        slope_error=error,
    )
    warn_user(fit.warnings)
    return fit


def t_quantile(level: float, degrees_of_freedom: float) -> float:
    """Half width of a ``level`` interval in standard errors; infinite without freedom."""
    if degrees_of_freedom <= 0:
        return float("inf")
    return float(import_scipy().stats.t.ppf((1 + level) / 2, degrees_of_freedom))

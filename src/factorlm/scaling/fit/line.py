"""A straight line in log–log: the simplest law, and all that a few sizes can tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from factorlm.scaling.fit.data import (
    as_points,
    check_level,
    check_sizes,
    count_sizes,
    import_scipy,
    warn_user,
)
from factorlm.scaling.fit.misfit import misfit_p_value, misfit_warning, spread_of_seeds
from factorlm.scaling.fit.solve import Fitted, Law

FAR = 5.0
"""Standard deviations from a line that a point hardly ever has by chance."""


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
    robust_slope: float
    """By Huber's loss, which a run that went wrong moves little."""
    num_far: float
    """Points that are over ``FAR`` standard deviations, both by Huber's loss, from its line."""
    num_sizes: float
    """Of the points; runs within 5 % of FLOPs are of one size."""
    misfit_p_value: float
    """Probability that sizes lie so far off the line by the noise of seeds alone; NaN without
    seeds, and for two sizes."""

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
        if not self.degrees_of_freedom:
            return (
                "two points have no spread about their line: nothing says how sure its slope is",
            )
        found = misfit_warning(self.misfit_p_value, "line")
        if self.num_sizes == 2:
            found = (
                "through two sizes a line goes exactly: its interval is of the noise of seeds "
                "alone, and nothing says that sizes are on a line",
            )
        return (*found, *self._far_warning())

    def _far_warning(self) -> tuple[str, ...]:
        if not self.num_far:
            return ()
        return (
            f"points over {FAR:g} standard deviations off the line of the others: {self.num_far:g} "
            f"of {self.degrees_of_freedom + 2:g}. With less weight on such the slope is "
            f"{self.robust_slope:.4f}, not {self.slope:.4f}, whose interval is not to be trusted",
        )


def fit_line(compute: ArrayLike, loss: ArrayLike, *, level: float = 0.95) -> LineFit:
    """Fit log(loss) to log(compute) by least squares.

    ``compute`` (num_points,) in FLOPs and ``loss`` (num_points,) in nats; runs of one size with
    different seeds are points of their own. Warns (``FitWarning``) of points far off the line of
    the others. Raises ``ConfigError`` for fewer than two sizes and
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
    robust_slope, num_far = _robust(log_compute, loss)
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
        robust_slope=robust_slope,
        num_far=num_far,
        num_sizes=float(count_sizes(compute)),
        misfit_p_value=misfit_p_value(compute, residuals, 2, spread_of_seeds([(compute, loss)])),
    )
    warn_user(fit.warnings)
    return fit


def _robust(log_compute: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """Slope by Huber's loss, and how many points are far from its line."""
    law = Law(log_compute[None], np.ones((1, len(loss))), loss, may_rise=True)
    fitted = Fitted(law, E=0.0)
    is_far = np.abs(law.residuals(fitted.theta)) > FAR * fitted.noise
    return -float(fitted.theta[2]), float(np.sum(is_far)) if fitted.noise else 0.0


def t_quantile(level: float, degrees_of_freedom: float) -> float:
    """Half width of a ``level`` interval in standard errors; infinite without freedom."""
    if degrees_of_freedom <= 0:
        return float("inf")
    return float(import_scipy().stats.t.ppf((1 + level) / 2, degrees_of_freedom))

"""The law of parameters and tokens, E + A·N^−α + B·D^−β, and what it says of a budget."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import numpy as np
from numpy.typing import ArrayLike

from factorlm.config import check
from factorlm.scaling.fit.data import as_points, check_level, check_sizes, warn_user
from factorlm.scaling.fit.power_law import MAX_GAMMA_RATIO, exp
from factorlm.scaling.fit.solve import MAX_EXPONENT, Fitted, Law, Quantity

MAX_CORRELATION = 0.99
"""Of log N and log D: beyond it the two terms can stand in for each other."""
FLOPS_PER_PARAM_AND_TOKEN = 6.0
"""Of training: two forward, four backward."""
LEAST_EXPONENT = 1e-9
"""For the logarithm of an exponent that a search has brought to 0."""


@dataclass(frozen=True, kw_only=True)
class OptimalSize:
    """The model of lowest loss for a budget of training FLOPs."""

    num_params: float
    num_params_low: float
    num_params_high: float
    """Interval by profile likelihood, of the fit's level; 0 to infinity where nothing bounds it."""
    num_tokens: float
    num_tokens_low: float
    num_tokens_high: float
    """What the budget buys for the other end of the parameters' interval."""
    loss: float
    """In nats, by the law."""


@dataclass(frozen=True, kw_only=True)
class ChinchillaFit:
    """loss = ``E`` + ``A`` · num_params^−``alpha`` + ``B`` · num_tokens^−``beta``.

    Hoffmann et al., *Training Compute-Optimal Large Language Models* (arXiv 2203.15556), equation
    2. Each parameter has its interval by profile likelihood.
    """

    E: float
    """Entropy of the text, in nats."""
    E_low: float
    E_high: float
    A: float
    """Nats at one parameter."""
    A_low: float
    A_high: float
    B: float
    """Nats at one token."""
    B_low: float
    B_high: float
    alpha: float
    alpha_low: float
    alpha_high: float
    beta: float
    beta_low: float
    beta_high: float
    level: float
    """Probability of the intervals."""
    noise: float
    """Standard deviation of log(loss) about the law."""
    degrees_of_freedom: float
    """Points less five."""
    correlation: float
    """Of log N and log D over the points."""
    fitted: InitVar[Fitted]

    def __post_init__(self, fitted: Fitted) -> None:
        """Keep what intervals of further quantities need, beside the fields."""
        object.__setattr__(self, "_fitted", fitted)

    def predict(self, num_params: ArrayLike, num_tokens: ArrayLike) -> np.ndarray:
        """Loss in nats; the arguments broadcast."""
        log_params = np.log(np.asarray(num_params, dtype=np.float64))
        log_tokens = np.log(np.asarray(num_tokens, dtype=np.float64))
        of_params = np.exp(np.log(self.A) - self.alpha * log_params)
        return self.E + of_params + np.exp(np.log(self.B) - self.beta * log_tokens)

    def optimal_size(
        self, flops: float, *, flops_per_param_and_token: float = FLOPS_PER_PARAM_AND_TOKEN
    ) -> OptimalSize:
        """Parameters and tokens of the lowest loss at ``flops`` = 6 · N · D (equation 4 there).

        N = G (C/6)^(β/(α+β)) and D = (C/6)/N, with G = (αA/βB)^(1/(α+β)). Raises ``ConfigError``
        unless ``flops`` is finite and above 0.
        """
        check(bool(np.isfinite(flops)) and flops > 0, f"flops={flops:g} must be finite, above 0")
        log_budget = float(np.log(flops / flops_per_param_and_token))
        fitted: Fitted = self._fitted  # type: ignore[attr-defined]
        size = _log_best_size(fitted.law, log_budget)
        logs = size.value(fitted.theta), *fitted.interval(size, self.level)
        num_params, low, high = map(exp, logs)
        num_tokens, most, least = (exp(log_budget - log) for log in logs)
        return OptimalSize(
            num_params=num_params,
            num_params_low=low,
            num_params_high=high,
            num_tokens=num_tokens,
            num_tokens_low=least,
            num_tokens_high=most,
            loss=float(self.predict(num_params, num_tokens)),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the points cannot tell, in plain words."""
        found = []
        if self.degrees_of_freedom <= 0:
            found.append("as many parameters as points: nothing says how sure the law is")
        if abs(self.correlation) > MAX_CORRELATION:
            found.append(
                "parameters and tokens rise together (log N and log D have correlation "
                f"{self.correlation:.3f}): their terms cannot be told apart. Vary one at a fixed "
                "value of the other"
            )
        wide = [
            f"{name} {low:.3g} to {high:.3g}"
            for name, low, high in (
                ("alpha", self.alpha_low, self.alpha_high),
                ("beta", self.beta_low, self.beta_high),
            )
            if high > MAX_GAMMA_RATIO * low
        ]
        if wide and self.degrees_of_freedom > 0:
            found.append(
                f"the points do not identify {' and '.join(wide)} at {100 * self.level:g} %"
            )
        return tuple(found)


def fit_chinchilla(
    num_params: ArrayLike, num_tokens: ArrayLike, loss: ArrayLike, *, level: float = 0.95
) -> ChinchillaFit:
    """Fit E + A·N^−α + B·D^−β by robust least squares of log(loss), from many starts.

    ``num_params``, ``num_tokens`` and ``loss`` (in nats) are each (num_points,). Warns
    (``FitWarning``) where the points do not identify the parameters. Raises ``ConfigError`` for
    fewer than five points, fewer than two numbers of parameters or of tokens, and for values that
    are not finite and above 0.
    """
    N, D, loss = as_points(num_params=num_params, num_tokens=num_tokens, loss=loss)
    check(len(loss) >= 5, f"{len(loss)} points; E + A·N^−α + B·D^−β needs at least 5")
    check_sizes("num_params", N, 2, "E + A·N^−α + B·D^−β")
    check_sizes("num_tokens", D, 2, "E + A·N^−α + B·D^−β")
    check_level(level)
    fitted = Fitted(Law(np.log([N, D]), np.ones((2, len(loss))), loss))
    fit = _result(fitted, level, float(np.corrcoef(np.log(N), np.log(D))[0, 1]))
    warn_user(fit.warnings)
    return fit


def _result(fitted: Fitted, level: float, correlation: float) -> ChinchillaFit:
    law = fitted.law
    quantities = {
        "E": Quantity.parameter(0, 0.0, float(law.loss.max())),
        "A": Quantity.log_scale(law, 0),
        "B": Quantity.log_scale(law, 1),
        "alpha": Quantity.parameter(3, 0.0, MAX_EXPONENT),
        "beta": Quantity.parameter(4, 0.0, MAX_EXPONENT),
    }
    values: dict[str, float] = {}
    for name, quantity in quantities.items():
        found = (quantity.value(fitted.theta), *fitted.interval(quantity, level))
        best, low, high = map(exp, found) if name in "AB" else found
        values |= {name: best, f"{name}_low": low, f"{name}_high": high}
    return ChinchillaFit(
        **values,
        level=float(level),
        noise=fitted.noise,
        degrees_of_freedom=float(fitted.degrees_of_freedom),
        correlation=correlation,
        fitted=fitted,
    )


def _log_best_size(law: Law, log_budget: float) -> Quantity:
    """log N of the lowest loss where log N + log D = ``log_budget``, solved for log a of N's term.

    There αA·N^−α = βB·D^−β.
    """

    def log_slopes(theta: np.ndarray) -> tuple[float, float]:
        """log(αA) less the part that has log a, and log(βB)."""
        log_scales, exponents = theta[3:] * law.log_center, np.maximum(theta[3:], LEAST_EXPONENT)
        of_params, of_tokens = log_scales + np.log(exponents)
        return float(of_params), float(of_tokens + theta[2])

    def value(theta: np.ndarray) -> float:
        of_params, of_tokens = log_slopes(theta)
        ratio = theta[1] + of_params - of_tokens
        return float((ratio + theta[4] * log_budget) / max(theta[3] + theta[4], LEAST_EXPONENT))

    def solve(theta: np.ndarray, log_params: float) -> float:
        of_params, of_tokens = log_slopes(theta)
        slope_of_tokens = of_tokens - theta[4] * (log_budget - log_params)
        return float(slope_of_tokens - of_params + theta[3] * log_params)

    return Quantity(value=value, index=1, solve=solve)

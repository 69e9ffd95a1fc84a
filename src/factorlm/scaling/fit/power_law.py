"""The law E + A·C^−γ for one family of models, or for several that share E."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from factorlm.config import check
from factorlm.scaling.fit.data import (
    as_points,
    check_entropy,
    check_level,
    check_sizes,
    count_sizes,
    warn_user,
)
from factorlm.scaling.fit.misfit import misfit_p_value, misfit_warning, spread_of_seeds
from factorlm.scaling.fit.solve import MAX_EXPONENT, Fitted, Law, Quantity

Points = tuple[ArrayLike, ArrayLike]
"""Compute in FLOPs and loss in nats of a family's runs, each (num_points,)."""
MAX_GAMMA_RATIO = 2.0
"""An interval of γ from one value to more than so many times it says little."""


@dataclass(frozen=True, kw_only=True)
class PowerLawFit:
    """loss = ``E`` + ``A`` · compute^−``gamma``, each with its interval by profile likelihood."""

    E: float
    """Entropy of the text: the loss, in nats, that no compute goes below."""
    E_low: float
    E_high: float
    """``E`` itself where it was given."""
    A: float
    """Nats at one FLOP."""
    A_low: float
    A_high: float
    gamma: float
    gamma_low: float
    gamma_high: float
    level: float
    """Probability of the intervals."""
    noise: float
    """Standard deviation of log(loss) about the law, of all families that were fitted together."""
    degrees_of_freedom: float
    """Points of these families less their parameters."""
    misfit_p_value: float
    """Probability that sizes lie so far off the law by the noise of seeds alone, that of all these
    families; NaN without seeds, and for two sizes."""

    def predict(self, compute: ArrayLike) -> np.ndarray:
        """Loss at ``compute`` FLOPs, of the same shape."""
        log_compute = np.log(np.asarray(compute, dtype=np.float64))
        return self.E + np.exp(np.log(self.A) - self.gamma * log_compute)

    def compute_for(self, loss: float) -> float:
        """FLOPs at which the law has ``loss``; infinite at ``E`` and below."""
        if loss <= self.E:
            return float("inf")
        return float(np.exp((np.log(self.A) - np.log(loss - self.E)) / self.gamma))

    def local_slope(self, loss: float) -> float:
        """d log(loss) / d log(compute) where the law has ``loss``: −γ (1 − E / loss).

        Points fix it far better than γ, which moves with E.
        """
        return -self.gamma * (1 - self.E / loss)

    @property
    def is_identified(self) -> bool:
        """Whether the points fix E and gamma."""
        is_straight = self.E_low == 0 < self.E_high
        has_gamma = self.gamma_high <= MAX_GAMMA_RATIO * self.gamma_low
        return self.degrees_of_freedom > 0 and not is_straight and has_gamma

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the points cannot tell, in plain words."""
        if self.degrees_of_freedom <= 0:
            return (
                "as many parameters as points: the law goes through every point, and nothing says "
                "how sure it is",
            )
        misfit = misfit_warning(self.misfit_p_value, "law E + A·C^−γ")
        if self.is_identified:
            return misfit
        return (
            f"the points do not identify E and gamma: at {100 * self.level:g} %, E is "
            f"{self.E_low:.3g} to {self.E_high:.3g} and gamma {self.gamma_low:.3g} to "
            f"{self.gamma_high:.3g}. Report the straight line too, and slopes at a fixed loss",
            *misfit,
        )


def fit_power_law(
    compute: ArrayLike, loss: ArrayLike, *, E: float | None = None, level: float = 0.95
) -> PowerLawFit:
    """Fit E + A·C^−γ by robust least squares of log(loss), from many starts.

    ``compute`` (num_points,) in FLOPs and ``loss`` (num_points,) in nats; runs of one size with
    different seeds are points of their own. With ``E`` the entropy is fixed, not fitted. Warns
    (``FitWarning``) where the points do not identify the parameters. Raises ``ConfigError`` for
    fewer sizes than parameters and for values that are not finite and above 0.
    """
    points = as_points(compute=compute, loss=loss)
    check_sizes("compute", points[0], 3 if E is None else 2, "E + A·C^−γ")
    fit = fits_of(joint_fit({"loss": points}, E), ["loss"], level)["loss"]
    warn_user(fit.warnings)
    return fit


def fit_power_laws(
    families: Mapping[str, Points], *, E: float | None = None, level: float = 0.95
) -> dict[str, PowerLawFit]:
    """Fit E + A_f·C^−γ_f to every family f at once, with one E.

    ``families`` maps a name to (compute, loss), as ``fit_power_law`` takes them. Families that were
    trained on the same data share E, the entropy of the data, and their noise is taken to be of one
    size. Warnings and errors are those of ``fit_power_law``; a family needs two sizes, and one of
    them three unless ``E`` is given.
    """
    checked = check_families(families, E)
    fits = fits_of(joint_fit(checked, E), list(checked), level)
    warn_user(
        dict.fromkeys(f"{name}: {text}" for name, fit in fits.items() for text in fit.warnings)
    )
    return fits


def check_families(
    families: Mapping[str, Points], E: float | None
) -> dict[str, tuple[np.ndarray, ...]]:
    """The points of every family as arrays; ``ConfigError`` for what cannot be fitted."""
    check(bool(families), "families is empty; name at least one")
    checked = {}
    for name, (compute, loss) in families.items():
        columns = {f"compute of {name}": compute, f"loss of {name}": loss}
        checked[name] = as_points(**columns)
        check_sizes(f"compute of {name}", checked[name][0], 2, "E + A·C^−γ")
    if E is None:
        sizes = max(count_sizes(compute) for compute, _ in checked.values())
        check(sizes >= 3, f"no family has more than {sizes} sizes; a shared E needs one with 3")
    return checked


def joint_fit(
    families: Mapping[str, tuple[np.ndarray, ...]], E: float | None, *, is_robust: bool = True
) -> Fitted:
    """All families in one law of a term each; ``ConfigError`` for an ``E`` that cannot be.

    Without ``is_robust`` by plain least squares, and laws may rise, as lines do.
    """
    loss = np.concatenate([loss for _, loss in families.values()])
    if E is not None:
        check_entropy(E, loss)
    owner = np.repeat(np.arange(len(families)), [len(loss) for _, loss in families.values()])
    log_compute = np.log(np.concatenate([compute for compute, _ in families.values()]))
    mask = (owner == np.arange(len(families))[:, None]).astype(np.float64)
    log_x = np.tile(log_compute, (len(families), 1))
    law = Law(log_x, mask, loss, may_rise=not is_robust)
    return Fitted(law, E=E, is_robust=is_robust)


def fits_of(fitted: Fitted, names: list[str], level: float) -> dict[str, PowerLawFit]:
    """The result for each family, in the order of the law's terms."""
    check_level(level)
    E = float(fitted.theta[0])
    is_fixed = bool(fitted.pins)
    entropy = Quantity.parameter(0, 0.0, float(fitted.law.loss.max()))
    E_low, E_high = (E, E) if is_fixed else fitted.interval(entropy, level)
    misfits = _misfits(fitted)
    fits = {}
    for term, name in enumerate(names):
        log_scale = Quantity.log_scale(fitted.law, term)
        gamma = Quantity.parameter(1 + len(names) + term, 0.0, MAX_EXPONENT)
        scales, gammas = fitted.interval(log_scale, level), fitted.interval(gamma, level)
        fits[name] = PowerLawFit(
            E=E,
            E_low=E_low,
            E_high=E_high,
            A=exp(log_scale.value(fitted.theta)),
            A_low=exp(scales[0]),
            A_high=exp(scales[1]),
            gamma=gamma.value(fitted.theta),
            gamma_low=gammas[0],
            gamma_high=gammas[1],
            level=float(level),
            noise=fitted.noise,
            degrees_of_freedom=float(fitted.degrees_of_freedom),
            misfit_p_value=misfits[term],
        )
    return fits


def _misfits(fitted: Fitted) -> list[float]:
    """Of each term; the shared E is taken to cost a family nothing, which is on the safe side."""
    law, residuals = fitted.law, fitted.law.residuals(fitted.theta)
    owned = [mask > 0 for mask in law.mask]
    compute = [np.exp(law.log_x[term, own]) for term, own in enumerate(owned)]  # in any unit
    seeds = spread_of_seeds((c, law.loss[own]) for c, own in zip(compute, owned, strict=True))
    return [
        misfit_p_value(c, residuals[own], 2, seeds) for c, own in zip(compute, owned, strict=True)
    ]


def exp(value: float) -> float:
    """e to the ``value``; infinite without a warning where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))

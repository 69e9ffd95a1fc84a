"""Everything that is fitted to families of points: lines, laws with a shared E, comparisons."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factorlm.scaling import (
    Comparison,
    FitWarning,
    HeldOut,
    LineFit,
    PowerLawFit,
    SlopeDifference,
    compare_lines,
    compare_power_laws,
    fit_line,
    fit_power_laws,
    hold_out_largest,
    hold_out_largest_of,
    slopes_over_entropy,
    turning_entropy,
)
from factorlm.scaling.fit.data import Families, count_sizes
from factorlm.scaling.fit.misfit import fit_runs_or_sizes

MIN_SIZES_FOR_ENTROPY = 3
"""Of one family at least: fewer cannot tell E + A·C^−γ from a straight line."""
MAX_ENTROPY = 0.9
"""The largest E that is looked at, as a share of the lowest loss."""
MAX_ENTROPIES = 8
LINES, LAWS = "straight lines", "laws that share E"
"""As ``Analysis.of_sizes`` names them."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All that is fitted; what the points are too few for is empty."""

    base: str
    lines: dict[str, LineFit]
    comparisons: dict[str, Comparison]
    """Of the lines with that of ``base``."""
    laws: dict[str, PowerLawFit]
    """With one E, fitted to all families."""
    of_sizes: tuple[str, ...]
    """Which of the two are fitted to the means of sizes, since these lie farther off than runs of
    one size from each other."""
    shared: dict[str, Comparison]
    """Of these laws with that of ``base``."""
    middle_loss: float
    """At which local slopes are given, in nats: amid the losses that all families have."""
    laws_over: tuple[dict[str, PowerLawFit], ...]
    """With one E that is given, for a range of it."""
    over_entropy: dict[str, tuple[SlopeDifference, ...]]
    """Slopes less that of ``base`` over the same range."""
    turning: dict[str, float]
    """Family to the E at which its order with ``base`` turns; NaN for none."""
    held_out: dict[str, dict[str, HeldOut]]
    """By law and family."""

    @property
    def has_entropy(self) -> bool:
        """Whether the points say what E is."""
        return bool(self.laws) and all(law.is_identified for law in self.laws.values())


def analyse(families: Families, base: str, entropies: Sequence[float], level: float) -> Analysis:
    """Fit everything that the points allow; each family has at least two sizes.

    Raises ``ConfigError`` for a ``level`` that is none, and where scipy is missing.
    """
    others = [name for name in families if name != base]
    may_share = most_sizes(families) >= MIN_SIZES_FOR_ENTROPY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # the sentences say it
        of_lines, lines = fit_lines(families, level)
        of_laws, laws = fit_laws(families, level) if may_share else (families, {})
        return Analysis(
            base=base,
            lines=lines,
            comparisons=compare_lines(of_lines, base, level=level) if others else {},
            laws=laws,
            of_sizes=tuple(
                name
                for name, points in ((LINES, of_lines), (LAWS, of_laws))
                if points is not families
            ),
            shared=compare_power_laws(of_laws, base, level=level) if others and may_share else {},
            middle_loss=middle_loss(families),
            laws_over=tuple(fit_power_laws(of_lines, E=E, level=level) for E in entropies),
            over_entropy=(
                slopes_over_entropy(of_lines, base, entropies, level=level) if others else {}
            ),
            turning={name: turning_entropy(families, base, name) for name in others},
            held_out=_held_out(families),
        )


def fit_lines(families: Families, level: float) -> tuple[Families, dict[str, LineFit]]:
    """Straight lines, after the runs or means of sizes that they are fitted to."""
    points, lines = fit_runs_or_sizes(
        families,
        lambda points: {name: fit_line(*runs, level=level) for name, runs in points.items()},
    )
    return points, dict(lines)


def fit_laws(families: Families, level: float) -> tuple[Families, dict[str, PowerLawFit]]:
    """Laws that share an E, after what they are fitted to."""
    points, laws = fit_runs_or_sizes(families, lambda points: fit_power_laws(points, level=level))
    return points, dict(laws)


def of_sizes_note(laws: str) -> str:
    """Why ``laws`` are fitted to means."""
    return (
        f"{laws[0].upper()}{laws[1:]} are fitted to the mean of each size: sizes lie farther off "
        "them than seeds of one size from each other, so that runs of one size are not points of "
        "their own, and intervals have to be of the scatter of sizes."
    )


def entropy_range(families: Families) -> tuple[float, ...]:
    """At most ``MAX_ENTROPIES`` round values from 0 to below the lowest loss, in nats."""
    largest = MAX_ENTROPY * min(float(loss.min()) for _, loss in families.values())
    power = 10.0 ** math.floor(math.log10(largest))
    steps = (power * share for share in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0))
    step = next(step for step in steps if largest / step < MAX_ENTROPIES)
    return tuple(round(step * index, 12) for index in range(int(largest / step) + 1))


def most_sizes(families: Families) -> int:
    """Of the family with most."""
    return max(count_sizes(compute) for compute, _ in families.values())


def middle_loss(families: Families) -> float:
    """Amid the losses that all families have, in nats."""
    highest = min(loss.max() for _, loss in families.values())
    lowest = max(loss.min() for _, loss in families.values())
    return float(np.sqrt(highest * lowest))


def _held_out(families: Families) -> dict[str, dict[str, HeldOut]]:
    """Of families with three sizes or more: two have to be left."""
    enough = {name: p for name, p in families.items() if count_sizes(p[0]) >= 3}
    if not enough:
        return {}
    found = {"straight line": {name: hold_out_largest(fit_line, *p) for name, p in enough.items()}}
    if most_sizes(enough) > MIN_SIZES_FOR_ENTROPY:
        found["shared E"] = hold_out_largest_of(enough)
    return found

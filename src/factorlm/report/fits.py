"""Scaling laws of families of runs: what is fitted to their points, and what is not, and why."""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from factorlm.config import check
from factorlm.errors import DataError, did_you_mean
from factorlm.report.analysis import (
    LINES,
    Analysis,
    analyse,
    entropy_range,
    most_sizes,
    of_sizes_note,
)
from factorlm.report.points import FamilyPoints, Study
from factorlm.scaling import (
    ChinchillaFit,
    Comparison,
    FitWarning,
    HeldOut,
    OptimalSize,
    bootstrap,
    fit_chinchilla,
    fit_line,
    fit_power_law,
    hold_out_largest,
)
from factorlm.scaling.fit.chinchilla import MAX_CORRELATION
from factorlm.scaling.fit.data import Families, count_sizes, size_numbers
from factorlm.scaling.fit.trust import MIN_SEEDS, MIN_SIZES

BASE = "dense"
MIN_CHINCHILLA_RUNS = 6
"""One more than the law has parameters."""
Intervals = dict[str, tuple[float, float]]
"""Name of a parameter to the ends of its interval."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The best model of a family for a budget, by its law of parameters and tokens."""

    flops: float
    best: OptimalSize
    flops_per_param_and_token: float
    """Geometric mean over the points; 6 where all FLOPs are products with weights."""
    lowest_ratio: float
    highest_ratio: float
    """The same of single points."""
    is_extrapolated: bool
    """It has more or fewer parameters or tokens than any point."""


@dataclass(frozen=True, kw_only=True)
class StudyFits:
    """All that is fitted to a study."""

    study: Study
    families: dict[str, tuple[np.ndarray, np.ndarray]]
    """(FLOPs, loss) of the families that have a law, each (num_runs,)."""
    analysis: Analysis
    bootstrap: dict[str, dict[str, Intervals]]
    """Family to law to intervals; only where there are sizes and seeds enough."""
    chinchilla: dict[str, ChinchillaFit]
    """Of families in which parameters and tokens vary apart from each other."""
    budgets: dict[str, Budget]
    """Of the same families."""
    chinchilla_held_out: dict[str, HeldOut]
    """Family to its model of most parameters, by the law of the smaller ones, where these have one:
    the mean over its numbers of tokens."""
    notes: tuple[str, ...]
    """What is not fitted, and what the points cannot tell, in plain sentences."""


def fit_study(
    study: Study, *, base: str | None = None, level: float = 0.95, budget: float | None = None
) -> StudyFits:
    """Fit everything that the points of ``study`` allow.

    ``base`` None is the dense family, and the first one where there is none; ``budget`` None is the
    most FLOPs that a run of a family has. Raises ``DataError`` where no family has two sizes, and
    ``ConfigError`` for another ``base``, a ``level`` or a ``budget`` that cannot be.
    """
    check(budget is None or 0 < budget < math.inf, f"budget={budget} must be finite and above 0")
    families, notes = fitted_families(study)
    if not families:
        raise DataError("\n".join(["no family has two sizes to fit", *study.notes, *notes]))
    base = base_of(families, base)
    analysis = analyse(families, base, entropy_range(families), level)
    comparisons = honest_splits(analysis.comparisons, base, study)
    analysis = dataclasses.replace(analysis, comparisons=comparisons)
    grids, reasons = _chinchilla_fits(study, level)
    return StudyFits(
        study=study,
        families=families,
        analysis=analysis,
        bootstrap=_bootstraps(study, families, level),
        chinchilla=grids,
        budgets={name: _budget(study.families[name], fit, budget) for name, fit in grids.items()},
        chinchilla_held_out=_held_out(study, grids),
        notes=(*notes, *_notes(study, families, analysis), *reasons),
    )


def fitted_families(study: Study) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """(FLOPs, loss) of the families with two sizes, and a sentence for each of the others."""
    families, notes = {}, []
    for name, family in study.families.items():
        if len(family.fitted_sizes) >= 2:
            families[name] = family.compute_and_loss
        elif len(family.sizes) < 2:
            notes.append(f"{name} has one size, {family.sizes[0]}; a law needs two.")
        else:
            size = family.fitted_sizes[0]
            notes.append(f"{name}: its size {size} beats all others; a law needs two.")
    return families, notes


def base_of(families: Mapping[str, object], wanted: str | None) -> str:
    """The family that others are compared with. Raises ``ConfigError`` for an unknown one."""
    if wanted is not None:
        known = ", ".join(families)
        hint = did_you_mean(wanted, families)
        check(wanted in families, f"base={wanted!r} is none of the fitted families, {known}.{hint}")
        return wanted
    names = sorted(families, key=lambda name: (name != BASE, not name.startswith(BASE)))
    return names[0]


def honest_splits(
    comparisons: Mapping[str, Comparison], base: str, study: Study
) -> dict[str, Comparison]:
    """Comparisons with ``base``, without the split of a slope difference where both families do
    not have the same sizes in order."""
    first = study.families[base]
    return {
        name: comparison
        if _has_same_sizes(first, study.families[name])
        else dataclasses.replace(comparison, split=None)
        for name, comparison in comparisons.items()
    }


def _has_same_sizes(base: FamilyPoints, other: FamilyPoints) -> bool:
    """Sizes without a name are numbers of parameters, which differ between structures."""
    if base.is_grid or other.is_grid:
        return False
    return base.sizes == other.sizes or not set(base.sizes) & set(other.sizes)


def _notes(study: Study, families: Families, analysis: Analysis) -> Iterator[str]:
    yield from frontier_notes(study, families)
    yield from map(of_sizes_note, analysis.of_sizes)
    if LINES in analysis.of_sizes:
        yield "Laws with an E that is given are fitted to the same means."
    for fits in (analysis.lines, analysis.laws):
        for name, fit in fits.items():
            for warning in fit.warnings:
                yield f"{name}: {warning}."
    if not analysis.laws:
        yield "No family has three sizes; E + A·C^−γ needs one with three."
    if most_sizes(families) == 2:
        yield "No held-out check: no family has three sizes."
    for name, comparison in analysis.comparisons.items():
        if comparison.split is None:
            yield (
                f"{name} less {analysis.base}: not split into parts, which takes the same sizes in "
                "both, each trained for one number of tokens."
            )


def frontier_notes(study: Study, families: Families) -> Iterator[str]:
    """A sentence for each family of which not every point is fitted."""
    for name in families:
        family = study.families[name]
        if family.is_grid:
            yield (
                f"{name}: sizes and tokens vary apart from each other; laws of FLOPs are of the "
                f"{len(family.frontier)} of {len(family.points)} points that no cheaper one beats."
            )


def _bootstraps(study: Study, families: Families, level: float) -> dict[str, dict[str, Intervals]]:
    found = {}
    for name, points in families.items():
        if _may_bootstrap(study.families[name]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FitWarning)
                found[name] = {
                    law: bootstrap(fit, *points, level=level)
                    for law, fit in (("line", fit_line), ("power law", fit_power_law))
                }
    return found


def _may_bootstrap(family: FamilyPoints) -> bool:
    sizes = {point.flops for point in family.frontier}
    seeds = min(len(point.losses) for point in family.frontier)
    return len(sizes) >= MIN_SIZES and seeds >= MIN_SEEDS


def _chinchilla_fits(study: Study, level: float) -> tuple[dict[str, ChinchillaFit], list[str]]:
    fits, notes = {}, []
    for name, family in study.families.items():
        columns = _params_tokens_loss(family)
        reason = _why_no_chinchilla(family, *columns)
        if reason is not None:
            notes.append(f"{name}: no law of parameters and tokens: {reason}.")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            fits[name] = fit_chinchilla(*columns, level=level)
        notes += [f"{name}: {warning}." for warning in fits[name].warnings]
    return fits, notes


def _held_out(study: Study, fitted: Iterable[str]) -> dict[str, HeldOut]:
    found = {}
    for name in fitted:
        params, tokens, loss = _params_tokens_loss(study.families[name])
        is_kept = size_numbers(params) < size_numbers(params).max()
        columns = params[is_kept], tokens[is_kept], loss[is_kept]
        if is_kept.any() and _why_no_chinchilla(study.families[name], *columns) is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FitWarning)
                found[name] = hold_out_largest(fit_chinchilla, params, tokens, loss)
    return found


def _params_tokens_loss(family: FamilyPoints) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [
        (point.num_params, point.num_tokens, loss)
        for point in family.points
        for loss in point.losses
    ]
    params, tokens, losses = np.array(rows, dtype=np.float64).T
    return params, tokens, losses


def _why_no_chinchilla(
    family: FamilyPoints, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray
) -> str | None:
    if not family.is_grid:
        return "each size is trained for one number of tokens, which goes with it"
    if len(loss) < MIN_CHINCHILLA_RUNS:
        return f"it has {len(loss)} runs, and its five parameters need {MIN_CHINCHILLA_RUNS}"
    if min(count_sizes(params), count_sizes(tokens)) < 2:
        return "it has one size or one number of tokens"
    correlation = float(np.corrcoef(np.log(params), np.log(tokens))[0, 1])
    if abs(correlation) > MAX_CORRELATION:
        return f"they vary together (log N and log D have correlation {correlation:.3f})"
    return None


def _budget(family: FamilyPoints, fit: ChinchillaFit, flops: float | None) -> Budget:
    points = family.points
    ratios = [point.flops / (point.num_params * point.num_tokens) for point in points]
    ratio = statistics.geometric_mean(ratios)
    flops = points[-1].flops if flops is None else flops
    best = fit.optimal_size(flops, flops_per_param_and_token=ratio)
    params = [point.num_params for point in points]
    tokens = [point.num_tokens for point in points]
    is_inside = min(params) <= best.num_params <= max(params) and min(
        tokens
    ) <= best.num_tokens <= max(tokens)
    return Budget(
        flops=flops,
        best=best,
        flops_per_param_and_token=ratio,
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        is_extrapolated=not is_inside,
    )

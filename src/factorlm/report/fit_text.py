"""The fits of a study as tables with sentences, JSON and pictures."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from factorlm.report.analysis import LAWS
from factorlm.report.claims import claim_sentences, entropy_sentence, shared_sentences
from factorlm.report.fits import Budget, StudyFits
from factorlm.report.iso_flops import plot_iso_flops
from factorlm.report.laws import shared_curves
from factorlm.report.points import COUNTS, Study
from factorlm.report.scaling import (
    entropy_table,
    gamma_table,
    held_out_table,
    lines_table,
    multiplier_table,
    percent,
    slopes_of,
)
from factorlm.report.scaling_picture import plot_scaling
from factorlm.report.sections import Section, plain_json
from factorlm.report.tables import Table, format_count, format_scientific
from factorlm.scaling import Comparison
from factorlm.scaling.fit.data import size_means
from factorlm.scaling.fit.trust import MIN_SEEDS, MIN_SIZES
from factorlm.storage import storage_errors

SUFFIXES = (".png", ".svg")


def fits_text(fits: StudyFits, *, is_markdown: bool = False) -> str:
    """Every table with what it says, as plain text or Markdown."""
    return "\n\n".join(section.text(is_markdown=is_markdown) for section in _sections(fits))


def fits_json(fits: StudyFits) -> dict[str, Any]:
    """The same as JSON types; None for what is not finite."""
    found = dataclasses.asdict(fits)
    del found["families"]  # they are under study, size by size
    study = found.pop("study")
    study["families"] = {name: family["points"] for name, family in study["families"].items()}
    found |= study | {"notes": [*study["notes"], *found["notes"]]}
    return dict(plain_json(found | found.pop("analysis")))


def plot_fits(fits: StudyFits, folder: str | os.PathLike[str]) -> list[Path]:
    """Pictures as .png and .svg in ``folder``, which is made: ``scaling``, points with lines, laws
    and bands, and ``iso_flops_1``, ... for the families that have a law of parameters and tokens.

    Raises ``ConfigError`` where matplotlib is missing, ``StorageError`` for what cannot be written.
    """
    folder = Path(folder)
    with storage_errors(folder, verb="make"):
        folder.mkdir(parents=True, exist_ok=True)
    level = level_of(fits)
    has_laws = fits.analysis.has_entropy
    points = fits.families
    if LAWS in fits.analysis.of_sizes:
        points = {name: size_means(*runs) for name, runs in points.items()}
    laws = shared_curves(points, fits.analysis.laws, level) if has_laws else []
    paths = []
    for suffix in SUFFIXES:
        path = plot_scaling(
            fits.families,
            fits.analysis.base,
            folder / f"scaling{suffix}",
            lines=fits.analysis.lines,
            over=fits.analysis.over_entropy,
            laws=laws,
            xlabel=f"training FLOPs, {COUNTS[fits.study.count][1]}",
        )
        paths.append(path)
        for number, (name, fit) in enumerate(fits.chinchilla.items(), start=1):
            path = folder / f"iso_flops_{number}{suffix}"
            paths.append(plot_iso_flops(fits.study.families[name], fit, fits.budgets[name], path))
    return paths


def level_of(fits: StudyFits) -> float:
    """Probability of the intervals."""
    return fits.analysis.lines[fits.analysis.base].level


def _sections(fits: StudyFits) -> Iterator[Section]:
    found = fits.analysis
    yield Section(
        title="Last validation loss at training FLOPs",
        tables=[points_table(fits.study)],
        notes=[f"FLOPs: {COUNTS[fits.study.count][1]}, head included.", *fits.study.notes],
    )
    yield Section(
        title="Straight lines in log–log",
        tables=[lines_table(found.lines, found.comparisons, found.base)],
        notes=[
            sentence
            for name, comparison in found.comparisons.items()
            for sentence in claim_sentences(comparison, found.turning[name])
        ],
    )
    if found.laws:
        yield _entropy_section(fits)
    yield from _multiplier_sections(fits)
    tables = [held_out_table(found.held_out)] if found.held_out else []
    if fits.chinchilla_held_out:
        by_law = {"E + A·N^−α + B·D^−β": fits.chinchilla_held_out}
        tables.append(held_out_table(by_law, "most parameters"))
    if tables:
        yield Section(title="The largest size, predicted from the smaller ones", tables=tables)
    yield _bootstrap_section(fits)
    if fits.chinchilla:
        yield _chinchilla_section(fits)
    if fits.notes:
        yield Section(title="What the points do not say", notes=fits.notes)


def points_table(study: Study) -> Table:
    """A row a size and number of tokens: its seeds, mean loss and spread."""
    rows = []
    for family in study.families.values():
        for point in family.points:
            row = (
                family.name,
                point.size,
                format_count(point.num_params),
                format_count(point.num_tokens),
                format_scientific(point.flops),
                f"{point.loss:.4f}",
                "" if point.spread is None else f"± {point.spread:.4f}",
                str(len(point.losses)),
                "" if point in family.frontier else "beaten by a cheaper one",
            )
            rows.append(row)
    header = ("family", "size", "parameters", "tokens", "FLOPs", "loss", "spread", "seeds", "")
    return Table(header=header, rows=tuple(rows))


def _entropy_section(fits: StudyFits) -> Section:
    found = fits.analysis
    tables = [gamma_table(found.laws_over, found.laws, found.middle_loss)]
    if found.over_entropy:
        tables.append(entropy_table(found.over_entropy, slopes_of(found.shared), found.base))
    return Section(
        title="One entropy E for all: loss = E + A·C^−γ",
        tables=tables,
        notes=[
            entropy_sentence(found.laws[found.base]),
            *(text for one in found.shared.values() for text in shared_sentences(one)),
        ],
    )


def _multiplier_sections(fits: StudyFits) -> Iterator[Section]:
    found = fits.analysis
    yield from _multipliers("FLOPs for equal loss, by straight lines", found.comparisons.values())
    if found.has_entropy:
        yield from _multipliers("The same by laws that share E", found.shared.values())


def _multipliers(title: str, comparisons: Collection[Comparison]) -> Iterator[Section]:
    tables = [multiplier_table(one) for one in comparisons if one.multipliers]
    notes = [_no_multipliers(one) for one in comparisons if not one.multipliers]
    if comparisons:
        yield Section(title=title, tables=tables, notes=notes)


def _no_multipliers(comparison: Comparison) -> str:
    slopes = comparison.slopes
    pairs = (comparison.base, slopes.base_slope), (comparison.other, slopes.other_slope)
    for name, slope in pairs:
        if slope >= 0:
            return f"The loss of {name} does not fall with FLOPs, so none are those for equal loss."
    return f"{comparison.other} and {comparison.base} have no loss in common."


def _bootstrap_section(fits: StudyFits) -> Section:
    level = percent(level_of(fits))
    rows = tuple(
        (
            name,
            _interval(laws["line"]["slope"]),
            _interval(laws["power law"]["gamma"]),
            _interval(laws["power law"]["E"]),
        )
        for name, laws in fits.bootstrap.items()
    )
    header = ("family", f"slope of the line, {level}", f"γ, {level}", f"E, {level}")
    missing = [name for name in fits.families if name not in fits.bootstrap]
    rule = f"it takes {MIN_SIZES} sizes with {MIN_SEEDS} seeds each"
    return Section(
        title="Bootstrap, each family by itself",
        tables=[Table(header=header, rows=rows)] if rows else [],
        notes=[f"Not of {', '.join(missing)}: {rule}."] if missing else [],
    )


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def _chinchilla_section(fits: StudyFits) -> Section:
    names = ("E", "A", "B", "alpha", "beta")
    rows = []
    for family, fit in fits.chinchilla.items():
        row = [family]
        for name in names:
            low, high = getattr(fit, f"{name}_low"), getattr(fit, f"{name}_high")
            row.append(f"{getattr(fit, name):.4g} ({low:.3g} to {high:.3g})")
        rows.append(tuple(row))
    return Section(
        title=f"Parameters N and tokens D: loss = E + A·N^−α + B·D^−β ({percent(level_of(fits))})",
        tables=[Table(header=("family", "E", "A", "B", "α", "β"), rows=tuple(rows))],
        notes=[
            _budget_sentence(name, budget, level_of(fits)) for name, budget in fits.budgets.items()
        ],
    )


def _budget_sentence(name: str, budget: Budget, level: float) -> str:
    best = budget.best
    low, high = (
        format_count(end) if math.isfinite(end) else "∞"
        for end in (best.num_params_low, best.num_params_high)
    )
    text = (
        f"{name}, {format_scientific(budget.flops)} FLOPs: best with "
        f"{format_count(best.num_params)} parameters ({percent(level)}: {low} to {high}) and "
        f"{format_count(best.num_tokens)} tokens, loss {best.loss:.4f}. "
        f"FLOPs are {budget.flops_per_param_and_token:.2f}·N·D "
        f"({budget.lowest_ratio:.2f} to {budget.highest_ratio:.2f} over the points)."
    )
    return text + (" That is outside the points." if budget.is_extrapolated else "")

"""Fitted laws as curves with bands, to draw over the points of a chart."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np

from factorlm.report.analysis import (
    LAWS,
    LINES,
    fit_laws,
    fit_lines,
    middle_loss,
    of_sizes_note,
)
from factorlm.report.claims import split_notes
from factorlm.report.fits import base_of, fitted_families, frontier_notes, honest_splits
from factorlm.report.payload import ScalingCurve, ScalingFits
from factorlm.report.points import Study, study_of
from factorlm.report.reading import Report
from factorlm.report.scaling import gamma_table, lines_table
from factorlm.scaling import (
    FitWarning,
    LineFit,
    PowerLawFit,
    ScipyMissingError,
    compare_lines,
    power_law_bands,
)
from factorlm.scaling.fit.data import Families

LINES_TITLE = "Straight lines in log–log"
LINE = "straight lines"
SHARED = "E + A·C^−γ, shared E"
"""``ScalingCurve.law`` of the two laws that are drawn."""
NUM_PLACES = 17
"""Of one curve; each place of a curved law's band is a fit of its own."""
MIN_SIZES = 3
"""Of a family whose law is drawn."""
MAX_COMPARED = 8
"""Families: a joint fit of more takes long, and nobody reads it."""
MARGIN = 1.3
"""A curve goes so many times beyond the points."""


def report_fits(report: Report, *, level: float = 0.95) -> ScalingFits:
    """The laws of a report's families over executed FLOPs, and why others are not drawn.

    A family needs three sizes: through two a line goes exactly. Where scipy is missing, the notes
    say so and nothing is fitted. Raises ``ConfigError`` for a ``level`` that is none.
    """
    study = study_of(report.runs, "executed_flops")
    families = {
        name: points
        for name, points in fitted_families(study)[0].items()
        if len(study.families[name].fitted_sizes) >= MIN_SIZES
    }
    few = [name for name in report.families if name not in families]
    if not families:
        return ScalingFits(notes=(f"No family has {MIN_SIZES} sizes of finished runs to fit.",))
    notes = [*study.notes, *frontier_notes(study, families)]
    if few:
        notes.append(f"Not fitted, fewer than {MIN_SIZES} sizes: {', '.join(few)}.")
    try:
        fits = _fits(study, families, level)
    except ScipyMissingError as error:
        return ScalingFits(notes=(f"No fits: {error}",))
    return dataclasses.replace(fits, notes=(*notes, *fits.notes))


def _fits(study: Study, families: Families, level: float) -> ScalingFits:
    base = base_of(families, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # the notes say it
        of_lines, lines = fit_lines(families, level)
    curves = line_curves(families, lines)
    remarks = [] if of_lines is families else [of_sizes_note(LINES)]
    remarks += _warnings(lines)
    if len(families) > MAX_COMPARED:
        tables = {LINES_TITLE: lines_table(lines, {}, base)}
        note = f"{len(families)} families are not compared with each other: give the runs of fewer."
        return ScalingFits(curves=curves, tables=tables, notes=(*remarks, note))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # the notes say it
        of_laws, laws = fit_laws(families, level)
    compared = compare_lines(of_lines, base, level=level) if len(families) > 1 else {}
    compared = honest_splits(compared, base, study)
    tables = {LINES_TITLE: lines_table(lines, compared, base)}
    remarks += [note for comparison in compared.values() for note in split_notes(comparison)]
    remarks += [] if of_laws is families else [of_sizes_note(LAWS)]
    if not all(law.is_identified for law in laws.values()):
        notes = _warnings(laws, before=f"{SHARED} is not drawn: ")
        return ScalingFits(curves=curves, tables=tables, notes=[*remarks, *notes])
    tables[SHARED] = gamma_table((), laws, middle_loss(families))
    curves = [*shared_curves(of_laws, laws, level), *curves]
    return ScalingFits(curves=curves, tables=tables, notes=[*remarks, *_warnings(laws)])


def _warnings(
    fits: Mapping[str, LineFit] | Mapping[str, PowerLawFit], before: str = ""
) -> list[str]:
    return [f"{before}{name}: {text}." for name, fit in fits.items() for text in fit.warnings]


def line_curves(families: Families, lines: Mapping[str, LineFit]) -> list[ScalingCurve]:
    """The straight lines of families with their bands; without one where nothing says how wide."""
    curves = []
    for name, line in lines.items():
        places = _places(families[name][0])
        low, high = line.band(places) if line.degrees_of_freedom else ((), ())
        curves.append(_curve(name, LINE, places, line.predict(places), low, high))
    return curves


def shared_curves(
    families: Families, laws: Mapping[str, PowerLawFit], level: float
) -> list[ScalingCurve]:
    """The laws of families, fitted with one E, with their bands."""
    places = {name: _places(compute) for name, (compute, _) in families.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        bands = power_law_bands(families, places, level=level)
    return [
        _curve(name, SHARED, places[name], law.predict(places[name]), *bands[name])
        for name, law in laws.items()
    ]


def _places(compute: np.ndarray) -> np.ndarray:
    return np.geomspace(compute.min() / MARGIN, compute.max() * MARGIN, NUM_PLACES)


def _curve(
    family: str,
    law: str,
    places: np.ndarray,
    loss: np.ndarray,
    low: np.ndarray | tuple[()],
    high: np.ndarray | tuple[()],
) -> ScalingCurve:
    if not np.all(np.isfinite([*low, *high])):
        low = high = ()  # nothing says how wide it is
    columns = (np.asarray(values).tolist() for values in (places, loss, low, high))
    compute, losses, lows, highs = columns
    return ScalingCurve(family=family, law=law, compute=compute, loss=losses, low=lows, high=highs)

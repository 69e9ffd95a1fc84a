"""Fitted laws as curves with bands, to draw over the points of a chart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from factorlm.report.payload import ScalingCurve
from factorlm.report.scaling import Families
from factorlm.scaling import FitWarning, LineFit, PowerLawFit, power_law_bands

LINE = "straight lines"
SHARED = "E + A·C^−γ, shared E"
"""``ScalingCurve.law`` of the two laws that are drawn."""
NUM_PLACES = 17
"""Of one curve; each place of a curved law's band is a fit of its own."""
MARGIN = 1.3
"""A curve goes so many times beyond the points."""


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
    columns = (np.asarray(values).tolist() for values in (places, loss, low, high))
    compute, losses, lows, highs = columns
    return ScalingCurve(family=family, law=law, compute=compute, loss=losses, low=lows, high=highs)

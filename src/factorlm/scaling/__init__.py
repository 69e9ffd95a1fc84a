"""Scaling laws: fits with intervals, and the published points. Works without torch."""

from factorlm.scaling.fit.bands import power_law_bands
from factorlm.scaling.fit.chinchilla import ChinchillaFit, OptimalSize, fit_chinchilla
from factorlm.scaling.fit.compare import (
    Comparison,
    ComputeMultiplier,
    compare_lines,
    compare_power_laws,
)
from factorlm.scaling.fit.crossing import Crossing
from factorlm.scaling.fit.data import FitWarning, ScipyMissingError
from factorlm.scaling.fit.line import LineFit, fit_line
from factorlm.scaling.fit.power_law import PowerLawFit, fit_power_law, fit_power_laws
from factorlm.scaling.fit.slopes import SlopeDifference, slopes_over_entropy, turning_entropy
from factorlm.scaling.fit.split import SlopeSplit
from factorlm.scaling.fit.trust import HeldOut, bootstrap, hold_out_largest, hold_out_largest_of
from factorlm.scaling.published import published_families, published_records

__all__ = [
    "ChinchillaFit",
    "Comparison",
    "ComputeMultiplier",
    "Crossing",
    "FitWarning",
    "HeldOut",
    "LineFit",
    "OptimalSize",
    "PowerLawFit",
    "ScipyMissingError",
    "SlopeDifference",
    "SlopeSplit",
    "bootstrap",
    "compare_lines",
    "compare_power_laws",
    "fit_chinchilla",
    "fit_line",
    "fit_power_law",
    "fit_power_laws",
    "hold_out_largest",
    "hold_out_largest_of",
    "power_law_bands",
    "published_families",
    "published_records",
    "slopes_over_entropy",
    "turning_entropy",
]

"""Why one family is steeper than another: cheaper large models, or a smaller loss gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from factorlm.scaling.fit.data import count_sizes, import_scipy, size_numbers
from factorlm.scaling.fit.line import t_quantile


@dataclass(frozen=True, kw_only=True)
class SlopeSplit:
    """A difference between the slopes of two straight lines in log–log, in two parts.

    A family with the base's very losses, each at its own FLOPs, has already another slope where the
    ratio of FLOPs changes with size. The rest is the loss gap changing with size.
    """

    total: float
    """The sum of both parts: the difference of the slopes where both families have equally many
    seeds at each size. Where not, sizes are weighed otherwise than in the lines of the runs."""
    flops_part: float
    """Of the FLOP ratio: what the base's losses at the other's FLOPs would differ by."""
    gap_part: float
    """Of the loss gap: the slope of log(other's loss / base's loss) over the other's FLOPs."""
    gap_part_low: float
    gap_part_high: float
    """By Student's t over the sizes; what both families have in common at a size falls out."""
    gap_p_value: float
    """NaN for two sizes."""


def have_same_sizes(base: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> bool:
    """Whether both have as many sizes, so that they can be paired in order of compute."""
    return count_sizes(base[0]) == count_sizes(other[0])


def split_slopes(
    base: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...], level: float
) -> SlopeSplit:
    """Split the slope difference of two families (compute, loss) with the same sizes.

    Each size has the mean of log(loss) over its seeds, with the weight 1 / (1/m + 1/n) for m seeds
    of one family and n of the other: the variance of its gap is so many times that of a run. Where
    m and n are equal at every size, these are the slopes of the runs' own lines.
    """
    base_compute, base_loss, base_seeds = _by_size(base)
    other_compute, other_loss, other_seeds = _by_size(other)
    weights = base_seeds * other_seeds / (base_seeds + other_seeds)
    base_slope, _ = _weighted_slope(base_compute, base_loss, weights)
    moved_slope, _ = _weighted_slope(other_compute, base_loss, weights)
    gap, error = _weighted_slope(other_compute, other_loss - base_loss, weights)
    degrees = len(weights) - 2
    width = t_quantile(level, degrees) * error if degrees else np.inf
    return SlopeSplit(
        total=moved_slope - base_slope + gap,
        flops_part=moved_slope - base_slope,
        gap_part=gap,
        gap_part_low=gap - width,
        gap_part_high=gap + width,
        gap_p_value=_chance(gap, error, degrees),
    )


def _by_size(points: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of log(compute) and log(loss) and number of runs of each size, ascending."""
    owner = size_numbers(points[0])
    seeds = np.bincount(owner)
    compute, loss = (np.bincount(owner, weights=np.log(column)) / seeds for column in points)
    return compute, loss, seeds


def _weighted_slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Of the weighted least-squares line, with its standard error: 0 for two points."""
    x = x - np.average(x, weights=weights)
    y = y - np.average(y, weights=weights)
    spread = np.sum(weights * x**2)
    slope = np.sum(weights * x * y) / spread
    variance = np.sum(weights * (y - slope * x) ** 2) / max(len(x) - 2, 1)
    return float(slope), float(np.sqrt(variance / spread))


def _chance(slope: float, error: float, degrees: int) -> float:
    """p-value of ``slope`` against 0; NaN without freedom."""
    if not degrees:
        return float("nan")
    if error == 0:
        return float(slope == 0)
    return float(2 * import_scipy().stats.t.sf(abs(slope / error), degrees))

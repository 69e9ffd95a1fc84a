"""Why one family is steeper than another: cheaper large models, or a smaller loss gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from factorlm.scaling.fit.data import import_scipy
from factorlm.scaling.fit.line import t_quantile


@dataclass(frozen=True, kw_only=True)
class SlopeSplit:
    """A difference between the slopes of two straight lines in log–log, in two parts.

    A family with the base's very losses, each at its own FLOPs, has already another slope where the
    ratio of FLOPs changes with size. The rest is the loss gap changing with size.
    """

    total: float
    """The other family's slope less the base's."""
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
    return len(np.unique(base[0])) == len(np.unique(other[0]))


def split_slopes(
    base: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...], level: float
) -> SlopeSplit:
    """Split the slope difference of two families (compute, loss) with the same sizes.

    Each size counts once, with the mean of log(loss) over its seeds.
    """
    linregress = import_scipy().stats.linregress
    (base_compute, base_loss), (other_compute, other_loss) = _by_size(base), _by_size(other)
    base_slope = linregress(base_compute, base_loss).slope
    moved_slope = linregress(other_compute, base_loss).slope
    gap = linregress(other_compute, other_loss - base_loss)
    degrees = len(base_compute) - 2
    width = t_quantile(level, degrees) * gap.stderr if degrees else np.inf
    return SlopeSplit(
        total=float(moved_slope - base_slope + gap.slope),
        flops_part=float(moved_slope - base_slope),
        gap_part=float(gap.slope),
        gap_part_low=float(gap.slope - width),
        gap_part_high=float(gap.slope + width),
        gap_p_value=float(gap.pvalue) if degrees else float("nan"),
    )


def _by_size(points: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """log(compute) and mean log(loss) of each size, ascending."""
    compute, loss = points
    sizes, owner = np.unique(compute, return_inverse=True)
    return np.log(sizes), np.bincount(owner, weights=np.log(loss)) / np.bincount(owner)

"""Learning rates for all sizes of a family, from grids at some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate of least loss on a grid, rate -> loss: the vertex of the parabola in log(rate)
    through the lowest point and its two neighbours. The lowest point itself where a neighbour is
    missing or its loss not finite; None where every loss is.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate], default=math.inf)
    if not math.isfinite(losses.get(best, math.inf)):
        return None
    at = rates.index(best)
    near = rates[max(at - 1, 0) : at + 2]
    if len(near) < 3 or not all(math.isfinite(losses[rate]) for rate in near):
        return best
    curve, slope, _ = np.polyfit(np.log(near) - math.log(best), [losses[r] for r in near], 2)
    return best * math.exp(-slope / (2 * curve)) if curve > 0 else best


def rate_at(num_params: int, best: Mapping[int, float]) -> float:
    """The rate of a model by the straight line through log(parameters) and log(best rate) of the
    tuned ones, parameters -> rate; where there is one of them, its rate. To three digits."""
    sizes, rates = np.log(list(best)), np.log(list(best.values()))
    line = np.polyfit(sizes, rates, min(1, len(best) - 1))
    return float(f"{math.exp(np.polyval(line, math.log(num_params))):.3g}")

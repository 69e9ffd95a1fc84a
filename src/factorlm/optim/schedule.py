"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_at(
    step: int,
    num_steps: int,
    *,
    peak: float,
    kind: Literal["cosine", "wsd", "constant"] = "cosine",
    warmup_ratio: float = 0.1,
    final_ratio: float = 0.1,
    decay_ratio: float = 0.2,
) -> float:
    """The rate of step ``step`` (0-based) of ``num_steps``.

    Linear warm-up over ``warmup_ratio`` of the steps, reaching ``peak`` in the first step after
    it; then ``cosine`` to ``final_ratio`` x peak, ``constant``, or ``wsd``: constant, and linear to
    ``final_ratio`` x peak over the last ``decay_ratio`` of the steps (arXiv 2404.06395).
    """
    warmup = int(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if kind == "constant":
        return peak
    length = num_steps - warmup if kind == "cosine" else int(decay_ratio * num_steps)
    done = min(max((step - (num_steps - length)) / max(length - 1, 1), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return peak * (final_ratio + (1 - final_ratio) * left)

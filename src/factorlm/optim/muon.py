"""Muon: the orthogonalised momentum, for matrices and for the blocks of block factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from factorlm.optim.matrix import (
    MATRIX_OPTIONS,
    check_matrices,
    orthogonal_momentum,
    rms_of_adamw,
    subtract_,
)
from factorlm.optim.newton_schulz import newton_schulz_flops
from factorlm.optim.rule import RULES, Group, Rule, State


@final
class MuonRule(Rule):
    """``torch.optim.Muon`` on (a, b), and on each block alone of (..., a, b).

    p ← (1 - lr x decay) p - s lr O, with O = ``newton_schulz`` of the Nesterov momentum.
    ``adjust_lr_fn`` gives s by the sizes of one block: ``match_rms_adamw``, 0.2 √max(a, b), so that
    AdamW's rate serves both (arXiv 2502.16982); ``original``, √max(1, a/b).
    """

    name = "muon"
    num_moments = 1
    options = MATRIX_OPTIONS

    def check_group(self, group: Group) -> None:
        """Matrices only, a momentum in [0, 1), a known ``adjust_lr_fn``."""
        check_matrices(self, group)
        adjust = group["adjust_lr_fn"]
        known = ("match_rms_adamw", "original")
        self.check(adjust in known, "adjust_lr_fn", adjust, f"must be one of {known}")

    def update(self, group: Group, state: State) -> None:
        """One step of every matrix that has a gradient."""
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            update = orthogonal_momentum(parameter, state[parameter], group)
            rate = _adjusted(group["lr"], group["adjust_lr_fn"], parameter.shape)
            decay = group["lr"] * group["weight_decay"]
            subtract_(parameter, update, rate=rate, decay=decay)

    def flops(self, shapes: Sequence[Sequence[int]]) -> int:
        """Those of Newton-Schulz."""
        return sum(newton_schulz_flops(shape) for shape in shapes)


def _adjusted(rate: float, adjust_lr_fn: str, shape: Sequence[int]) -> float:
    rows, columns = shape[-2:]
    if adjust_lr_fn == "original":
        return rate * math.sqrt(max(1, rows / columns))
    return rms_of_adamw(rate, (rows, columns))


RULES.register(MuonRule.name)(MuonRule())

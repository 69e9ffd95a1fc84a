"""Spectron (arXiv 2602.12429): two factors move so that their product moves at most η."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from torch import Tensor

from factorlm.layers.projection import wide
from factorlm.optim.matrix import (
    MATRIX_OPTIONS,
    check_matrices,
    check_pairs,
    orthogonal_momentum,
    pair_limit,
    pairs,
    subtract_,
    whole,
)
from factorlm.optim.newton_schulz import LARGEST_SINGULAR_VALUE, newton_schulz_flops
from factorlm.optim.rule import RULES, Group, Rule, State
from factorlm.optim.spectral import START_STEPS, power_steps, start_vectors


@final
class SpectronRule(Rule):
    """Pairs of factors: ``params`` is [first, second, first, second, ...], in order of application.

    p ← (1 - lr x decay) p - ρ O for both, with O = ``newton_schulz`` of the Nesterov momentum over
    1.203, so that ‖O‖₂ <= 1, and ρ = ``bounded_rate``. Then, without decay, ‖ΔW‖₂ <= η for their
    product W. ``adjust_lr_fn`` gives η by the sizes of W: ``match_rms_adamw``, 0.2 √max(I, O) lr,
    so that one rate serves pairs, Muon's matrices and AdamW; None, lr itself.

    A pair moves only if both of its factors have a gradient. σ stays on the device.
    """

    name = "spectron"
    num_moments = 1
    options = MATRIX_OPTIONS

    def check_group(self, group: Group) -> None:
        """Matrices in pairs that can be multiplied, a momentum in [0, 1), an ``adjust_lr_fn``."""
        check_matrices(self, group)
        check_pairs(self, group)

    def update(self, group: Group, state: State) -> None:
        """One step of every pair that has both gradients."""
        decay = group["lr"] * group["weight_decay"]
        for pair in pairs(group["params"]):
            if any(factor.grad is None for factor in pair):
                continue
            norms = [spectral_norm(factor, state[factor]) for factor in pair]
            limit = pair_limit(group["lr"], group["adjust_lr_fn"], pair)
            rate = bounded_rate(limit, *norms) / LARGEST_SINGULAR_VALUE
            for factor in pair:
                direction = orthogonal_momentum(factor, state[factor], group)
                # The rate is a tensor, not a number that would have to be waited for.
                update = direction.to(factor.dtype) * rate.to(factor.dtype)
                subtract_(factor, update, rate=1.0, decay=decay)

    def flops(self, shapes: Sequence[Sequence[int]]) -> int:
        """Those of Newton-Schulz, and of two products with a vector a factor."""
        return sum(newton_schulz_flops(shape) + 4 * math.prod(shape) for shape in shapes)


def bounded_rate(limit: float, first_norm: Tensor, second_norm: Tensor) -> Tensor:
    """ρ = η / (σ₁ + σ₂ + 1), η being ``limit``.

    ‖(B - ρ P)(A - ρ Q) - B A‖ <= ρ (σ₁ + σ₂ + ρ) for ‖P‖, ‖Q‖ <= 1, so it is at most η as long as
    η <= σ₁ + σ₂ + 1. The permutations between block factors are orthogonal and change nothing.
    """
    return limit / (first_norm + second_norm + 1)


def spectral_norm(factor: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The estimate of ‖factor‖₂, (), by one more step of power iteration; the first time by 100.

    That of a block-diagonal factor is its blocks' largest. ``state`` keeps the vectors.
    """
    matrix = wide(whole(factor.detach()))
    if "right_vectors" in state:
        norms, vectors = power_steps(matrix, state["right_vectors"].to(matrix.dtype), 1)
    else:
        norms, vectors = power_steps(matrix, start_vectors(matrix), START_STEPS)
    state["right_vectors"] = vectors.to(factor.dtype)  # the dtype in which PyTorch loads state
    return norms.amax()


RULES.register(SpectronRule.name)(SpectronRule())

"""LoRA-Muon (arXiv 2606.12921): Muon for a product of two factors, whatever their scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from factorlm.layers.projection import wide
from factorlm.optim.matrix import (
    MATRIX_OPTIONS,
    check_matrices,
    check_pairs,
    nesterov_momentum,
    pair_limit,
    pairs,
    subtract_,
    whole,
)
from factorlm.optim.newton_schulz import newton_schulz, newton_schulz_flops
from factorlm.optim.rule import RULES, Group, Rule, State

ROOT_STEPS = 16
"""Of ``inverse_root``: roots of eigenvalues down to 1e-4 of the trace are then right to 2e-4."""


@final
class LoraMuonRule(Rule):
    """Pairs of matrices V (R, I), U (O, R), flat in ``params`` as [V, U, V, U, ...].

    U ← (1 - lr x decay) U - η/2 msign(M_U S_V^-½) S_V^-½ with S_V = V Vᵀ, and V likewise with
    S_U = Uᵀ U; M are the Nesterov momenta and msign is ``newton_schulz``. U C and C⁻¹ V move as U
    and V do, for every invertible C (up to ``damping``, relative to the trace of a Gram matrix).
    ``adjust_lr_fn`` gives η as in Spectron.

    A pair moves only if both of its factors have a gradient. Nothing waits for the device.
    """

    name = "lora_muon"
    num_moments = 1
    options: ClassVar[dict[str, Any]] = MATRIX_OPTIONS | {"damping": 1e-4}

    def check_group(self, group: Group) -> None:
        """Plain matrices in pairs that can be multiplied, a damping above 0."""
        check_matrices(self, group)
        self.check(group["damping"] > 0, "damping", group["damping"], "must be above 0")
        check_pairs(self, group)
        self._check_plain([parameter.shape for parameter in group["params"]])

    def update(self, group: Group, state: State) -> None:
        """One step of every pair that has both gradients."""
        decay, precision = group["lr"] * group["weight_decay"], group["precision"]
        for pair in pairs(group["params"]):
            if any(factor.grad is None for factor in pair):
                continue
            V, U = (wide(whole(factor.detach())) for factor in pair)
            V_root, U_root = (inverse_root(S, group["damping"]) for S in (V @ V.mT, U.mT @ U))
            V_ahead, U_ahead = (
                whole(nesterov_momentum(factor, state[factor], group)).to(V.dtype)
                for factor in pair
            )
            V_step = U_root @ newton_schulz(U_root @ V_ahead, precision=precision).to(V.dtype)
            U_step = newton_schulz(U_ahead @ V_root, precision=precision).to(V.dtype) @ V_root
            rate = 0.5 * pair_limit(group["lr"], group["adjust_lr_fn"], pair)
            for factor, step in zip(pair, (V_step, U_step), strict=True):
                subtract_(factor, step.to(factor.dtype), rate=rate, decay=decay)

    def flops(self, shapes: Sequence[Sequence[int]]) -> int:
        """Newton-Schulz, a Gram matrix, its root and two products with it, for each factor."""
        self._check_plain(shapes)
        total = 0
        for (rank, columns), (rows, _) in zip(shapes[::2], shapes[1::2], strict=True):
            products = 3 * 2 * rank * rank * (rows + columns)
            roots = 2 * ROOT_STEPS * 3 * 2 * rank**3
            total += products + roots
        return total + sum(newton_schulz_flops(shape) for shape in shapes)

    def _check_plain(self, shapes: Sequence[Sequence[int]]) -> None:
        for shape in map(tuple, shapes):
            self.check(len(shape) == 2, "shape", shape, "must be a matrix, not a stack of blocks")


def inverse_root(gram: Tensor, damping: float, *, steps: int = ROOT_STEPS) -> Tensor:
    """(S + damping tr(S) 1)^-½ of a positive semidefinite S, (R, R), by matmuls alone.

    The coupled Newton-Schulz iteration (Higham, *Functions of Matrices*, section 6.7): Y → A^½ and
    Z → A^-½ for A scaled to a trace of at most 1, so that its eigenvalues lie in (0, 1].
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal().sum().clamp(min=torch.finfo(gram.dtype).tiny)
    scale = trace * (1 + damping * gram.shape[-1])
    Y, Z = (gram + damping * trace * identity) / scale, identity
    for _ in range(steps):
        T = 1.5 * identity - 0.5 * (Z @ Y)
        Y, Z = Y @ T, T @ Z
    return Z / scale.sqrt()


RULES.register(LoraMuonRule.name)(LoraMuonRule())

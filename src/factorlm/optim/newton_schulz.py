"""Newton-Schulz: all singular values of a matrix towards 1, by matmuls alone.

The quintic iteration of Muon (Keller Jordan, kellerjordan.github.io/posts/muon), as
``torch.optim.Muon`` runs it, for whole batches of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from factorlm.measure import has_fast_bf16

Precision = Literal["auto", "bf16", "fp32"]
"""See ``working_dtype``."""
NUM_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of one step: each singular value s becomes a s + b s³ + c s⁵."""
EPS = 1e-7
LARGEST_SINGULAR_VALUE = 1.203
"""The most that ``NUM_STEPS`` steps make of any singular value in [0, 1]: the maximum of the
composed polynomial, 1.2024, rounded up. Those from 0.01 on end at 0.68 or more."""


def newton_schulz(
    matrix: Tensor,
    *,
    steps: int = NUM_STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    precision: Precision = "auto",
) -> Tensor:
    """Orthogonalise each matrix P S Qᵀ of a batch (..., a, b), nearly: P f(S) Qᵀ, f(S) near 1.

    S is first divided by the matrix's Frobenius norm (or by ``eps``, if that is larger). Computed
    and returned in ``working_dtype``. One matrix in bf16 is bit-equal to ``torch.optim.Muon``'s;
    a batch is equal to its matrices one by one up to the rounding of matmuls.
    """
    a, b, c = coefficients
    batch = matrix.to(working_dtype(matrix, precision))
    if matrix.ndim > 3:
        batch = batch.flatten(0, -3)
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    batch = batch.mT if is_tall else batch  # the Gram matrix of the shorter side is the smaller
    batch = batch / _frobenius_norm(batch).clamp(min=eps)
    add_matmul = torch.addmm if batch.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = batch @ batch.mT
        gram_terms = add_matmul(gram, gram, gram, beta=b, alpha=c)
        batch = add_matmul(batch, gram_terms, batch, beta=a)
    return (batch.mT if is_tall else batch).reshape(matrix.shape)


def working_dtype(matrix: Tensor, precision: Precision = "auto") -> torch.dtype:
    """What ``newton_schulz`` computes in: float64 for float64, else bf16 or float32.

    ``auto`` is bf16, as in ``torch.optim.Muon``, but float32 on processors without instructions
    for bf16: there a matmul in bf16 is far slower.
    """
    if matrix.dtype == torch.float64:
        return torch.float64
    fast = precision == "bf16" or (precision == "auto" and has_fast_bf16(matrix.device.type))
    return torch.bfloat16 if fast else torch.float32


def newton_schulz_flops(shape: Sequence[int], *, steps: int = NUM_STEPS) -> int:
    """Matmul FLOPs of ``newton_schulz`` on (..., a, b): a step takes 4 a² b + 2 a³ a matrix, where
    a is its shorter side."""
    a, b = sorted(shape[-2:])
    return math.prod(shape[:-2]) * steps * (4 * a * a * b + 2 * a**3)


def _frobenius_norm(batch: Tensor) -> Tensor:
    """() for one matrix, (n, 1, 1) for n."""
    # One matrix has a call of its own: its reduction is bit-equal to that of torch.optim.Muon.
    return batch.norm() if batch.ndim == 2 else batch.norm(dim=(-2, -1), keepdim=True)

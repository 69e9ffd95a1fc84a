"""Truncated SVDs with balanced factors: the best approximations in Frobenius norm."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(weight: Tensor) -> Tensor:
    """``weight`` in float32 or wider: there is no SVD in bf16."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def balanced_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(..., O, I) -> (..., O, rank) and (..., rank, I) whose product is the best of that rank.

    W = P S Qᵀ gives P S^½ and S^½ Qᵀ of the ``rank`` leading singular values. ``weight`` is
    float32 or wider.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], root[..., :, None] * right[..., :rank, :]

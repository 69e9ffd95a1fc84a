"""Norms of factors, of their product and of its change, from small Gram matrices.

All of it in float64, since a Gram matrix squares what it is made of. The dense weight is not formed
where a structure overrides ``StructuredLinear.products``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Products = tuple[Tensor, Tensor]
"""left (..., o, r) and right (..., r, i): what ``StructuredLinear.products`` gives."""


def spectral_norm(factor: Tensor) -> Tensor:
    """‖factor‖₂, (): the root of the largest eigenvalue of the smaller Gram matrix.

    Of a block-diagonal factor (G, b, a) it is the largest of its blocks'. NaN where an entry is
    not finite.
    """
    matrix = factor.double()
    tall = matrix.shape[-2] > matrix.shape[-1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    largest = torch.linalg.eigvalsh(gram.nan_to_num(0.0, 0.0, 0.0)).amax().clamp(min=0.0)
    return largest.where(gram.isfinite().all(), math.nan).sqrt()


def product_rms(products: Products) -> Tensor:
    """The root mean square of the entries of W, ().

    ‖A B‖² = tr(AᵀA BBᵀ), added up over the batch.
    """
    left, right = (side.double() for side in products)
    squares = (left.mT @ left) * (right @ right.mT)
    num_entries = left.shape[:-1].numel() * right.shape[-1]
    return (squares.sum().clamp(min=0.0) / num_entries).sqrt()


def product_change(old: Products, new: Products) -> Products:
    """``new`` - ``old`` as a batch of products of twice the inner size.

    L' R' - L R = [L' - L, L] [R'; R' - R]: a small change is not the difference of large numbers.
    """
    (left, right), (new_left, new_right) = (
        tuple(side.double() for side in pair) for pair in (old, new)
    )
    return (
        torch.cat([new_left - left, left], dim=-1),
        torch.cat([new_right, new_right - right], dim=-2),
    )

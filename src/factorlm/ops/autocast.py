"""What autocast asks of an op of our own."""

from __future__ import annotations

import torch
from torch import Tensor


def is_cast(x: Tensor) -> bool:
    """Whether autocast casts the operands of a matmul of ``x``."""
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    return casts and x.is_floating_point() and x.dtype != torch.float64


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matmul of ``x`` runs in: autocast's where it is on, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if is_cast(x) else x.dtype

"""How factors are drawn: on the CPU, in float32, so that every device and rank sees one draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from factorlm.layers.config import Factor


def dense_std(std: float | None, in_features: int) -> float:
    """The standard deviation of a dense weight; None means ``nn.Linear``'s own."""
    return 1 / math.sqrt(3 * in_features) if std is None else std


def gaussian(shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> Tensor:
    """N(0, std²), float32, CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").mul_(std)


def orthogonal_polar(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """The orthogonal polar factor P Qᵀ of each Gaussian block P S Qᵀ; shape (..., a, b)."""
    left, _, right = torch.linalg.svd(gaussian(shape, 1.0, generator), full_matrices=False)
    return left @ right


def structure_aware_std(factor: Factor) -> float:
    """fan_in^-1/2 * min(1, (fan_out/fan_in)^1/2) (Compute Better Spent, ICML 2024)."""
    return factor.fan_in**-0.5 * min(1.0, (factor.fan_out / factor.fan_in) ** 0.5)

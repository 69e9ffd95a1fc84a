"""The largest singular value by power iteration, one warm-started step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

START_STEPS = 100
"""Steps from a random vector, after which the estimate is to lie within 2 %."""


def start_vectors(matrix: Tensor) -> Tensor:
    """Random unit vectors (..., b) for ``matrix`` (..., a, b), the same on every device."""
    generator = torch.Generator().manual_seed(0)
    shape = matrix.shape[:-2] + matrix.shape[-1:]
    vectors = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if matrix.is_cuda:
        vectors = vectors.pin_memory()  # pageable memory is copied while the host waits
    return _unit(vectors.to(matrix, non_blocking=True))


def power_step(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One step on each matrix W of (..., a, b) with its unit vector v of ``vectors`` (..., b).

    Gives ‖Wᵀ u‖ for u = W v / ‖W v‖, shape (...), which is never above ‖W‖₂, and the next
    vectors. Where W v is zero the estimate is 0 and v stays.
    """
    left = _unit(_times(vectors, matrix.mT))
    right = _times(left, matrix)
    norms = right.norm(dim=-1, keepdim=True)
    return norms.squeeze(-1), torch.where(norms > 0, _unit(right), vectors)


def power_steps(matrix: Tensor, vectors: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """``num_steps`` of ``power_step``, at least one; the last estimate and the next vectors."""
    norms, vectors = power_step(matrix, vectors)
    for _ in range(num_steps - 1):
        norms, vectors = power_step(matrix, vectors)
    return norms, vectors


def _times(vectors: Tensor, matrix: Tensor) -> Tensor:
    """vᵀ M. On the CPU a batched product with a column, M v, takes up to fifty times as long."""
    return (vectors.unsqueeze(-2) @ matrix).squeeze(-2)


def _unit(vectors: Tensor) -> Tensor:
    smallest = torch.finfo(vectors.dtype).tiny
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=smallest)

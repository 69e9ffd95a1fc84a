"""The naive truth beside every fast path: explicit blocks and permutations, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_reference(V: Tensor, U: Tensor) -> Tensor:
    """V (R, I), U (O, R) -> W (O, I): the sum of R outer products."""
    return torch.stack([torch.outer(u, v) for u, v in zip(U.t(), V, strict=True)]).sum(0)


def block_dense_reference(B: Tensor, L: Tensor) -> Tensor:
    """B (G, R/G, I/G), L (O, R) -> W (O, I) = L blockdiag(B)."""
    return L @ torch.block_diag(*B)


def block_shuffle_reference(
    first: Tensor, second: Tensor, *, output_shuffle: bool = True
) -> Tensor:
    """first (G, m/G, I/G), second (G, O/G, m/G) -> W (O, I).

    W = T blockdiag(second) P blockdiag(first), with permutation matrices P and T: P puts hidden
    value j into slot j div G of group j mod G, T puts slot s of group g at s G + g.
    """
    num_blocks = first.shape[0]
    first, second = torch.block_diag(*first), torch.block_diag(*second)
    shuffle = _shuffle_matrix(first.shape[0], num_blocks).to(first)
    weight = second @ shuffle @ first
    if output_shuffle:
        weight = _shuffle_matrix(second.shape[0], num_blocks).to(first).t() @ weight
    return weight


def _shuffle_matrix(size: int, num_blocks: int) -> Tensor:
    """The permutation matrix that moves element j to slot j div G of group j mod G."""
    matrix = torch.zeros(size, size)
    for j in range(size):
        matrix[(j % num_blocks) * (size // num_blocks) + j // num_blocks, j] = 1
    return matrix

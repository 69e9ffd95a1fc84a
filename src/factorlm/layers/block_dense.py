"""block_dense: W = L blockdiag(B) (arXiv 2406.16450)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from factorlm.layers.base import StructuredLinear
from factorlm.layers.config import (
    Factor,
    StructureConfig,
    check_count,
    check_divides,
    check_rank,
    check_ratio,
    register_structure,
    round_to_multiple,
)
from factorlm.layers.initialization import orthogonal_polar
from factorlm.layers.projection import balanced_svd
from factorlm.ops.block_dense import (
    block_dense,
    block_dense_dense,
    block_dense_gelu,
    block_dense_products,
)


@dataclass(frozen=True, kw_only=True)
class BlockDenseConfig(StructureConfig):
    """W (O, I) = L (O, R) times B, block-diagonal with G blocks (R/G, I/G)."""

    num_blocks: int = 2
    """G; divides I and R. The papers take 2 or 4."""
    rank: int | None = None
    """R, G <= R <= min(I, G O). None until ``for_param_ratio`` solves it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_blocks", self.num_blocks)
        if self.rank is not None:
            check_count("rank", self.rank)

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """B then L."""
        blocks = self.num_blocks
        check_divides(blocks, in_features=in_features)
        limit = min(in_features, blocks * out_features)
        rank = check_rank(self.rank, limit, "min(in_features, num_blocks * out_features)")
        check_divides(blocks, rank=rank)
        return (
            Factor("B", (blocks, rank // blocks, in_features // blocks)),
            Factor("L", (out_features, rank)),
        )

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """2 O R I / G."""
        B, _ = self.factors(in_features, out_features)
        return 2 * out_features * B.num_params

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """R = ratio I O / (I/G + O) at the given G, to the nearest multiple of G and
        ``multiple_of``, not over min(I, G O)."""
        check_ratio(ratio, multiple_of)
        blocks = self.num_blocks
        check_divides(blocks, in_features=in_features)
        exact = ratio * in_features * out_features / (in_features / blocks + out_features)
        limit = min(in_features, blocks * out_features)
        multiple = math.lcm(blocks, multiple_of)
        return self.replace(rank=round_to_multiple(exact, multiple, at_most=limit))


@register_structure("block_dense", BlockDenseConfig)
@final
class BlockDenseLinear(StructuredLinear):
    """y = L(Bx) + b."""

    config: BlockDenseConfig
    B: nn.Parameter
    L: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        return block_dense(x, self.B, self.L, self.bias)

    def fused_gelu(self, x: Tensor) -> Tensor | None:
        """gelu(L(Bx) + b), (*, I) -> (*, O), where a kernel takes it."""
        return block_dense_gelu(x, self.B, self.L, self.bias)

    def to_dense(self) -> Tensor:
        """L blockdiag(B), (O, I)."""
        return block_dense_dense(self.B, self.L)

    def products(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """The column panels."""
        return block_dense_products(*factors)

    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The truncated SVD of each column panel (O, I/G)."""
        panels = weight.unflatten(1, (self.config.num_blocks, -1)).transpose(0, 1)
        L, B = balanced_svd(panels, self.B.shape[1])  # (G, O, R/G), (G, R/G, I/G)
        return B, L.transpose(0, 1).flatten(1)

    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The orthogonal polar factor of each block; ``std`` plays no part."""
        B, L = self.factors
        return orthogonal_polar(B.shape, generator), orthogonal_polar(L.shape, generator)

"""low_rank: W = U V (arXiv 2407.09835, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from factorlm.layers.base import StructuredLinear
from factorlm.layers.config import (
    Factor,
    StructureConfig,
    check_count,
    check_rank,
    check_ratio,
    register_structure,
    round_to_multiple,
)
from factorlm.layers.initialization import dense_std, gaussian
from factorlm.layers.projection import balanced_svd
from factorlm.ops.low_rank import low_rank, low_rank_dense, low_rank_gelu


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(StructureConfig):
    """W (O, I) = U (O, R) V (R, I)."""

    rank: int | None = None
    """R, 1 <= R <= min(I, O). None until ``for_param_ratio`` solves it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_count("rank", self.rank)

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """V then U."""
        limit = min(in_features, out_features)
        rank = check_rank(self.rank, limit, "min(in_features, out_features)")
        return Factor("V", (rank, in_features)), Factor("U", (out_features, rank))

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """2 O R I."""
        V, _ = self.factors(in_features, out_features)
        return 2 * out_features * V.num_params

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """R = ratio I O / (I + O), to the nearest multiple, not over min(I, O)."""
        check_ratio(ratio, multiple_of)
        exact = ratio * in_features * out_features / (in_features + out_features)
        limit = min(in_features, out_features)
        return self.replace(rank=round_to_multiple(exact, multiple_of, at_most=limit))


@register_structure("low_rank", LowRankConfig)
@final
class LowRankLinear(StructuredLinear):
    """y = U(Vx) + b."""

    config: LowRankConfig
    V: nn.Parameter
    U: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        return low_rank(x, self.V, self.U, self.bias)

    def fused_gelu(self, x: Tensor) -> Tensor | None:
        """gelu(U(Vx) + b), (*, I) -> (*, O), where a kernel takes it."""
        return low_rank_gelu(x, self.V, self.U, self.bias)

    def to_dense(self) -> Tensor:
        """U V, (O, I)."""
        return low_rank_dense(self.V, self.U)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """V, then U."""
        return self.V, self.U

    def products(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """One: U by V."""
        V, U = factors
        return U, V

    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The truncated SVD of ``weight``."""
        U, V = balanced_svd(weight, self.V.shape[0])
        return V, U

    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The truncated SVD of a dense draw (spectral initialisation)."""
        shape = (self.out_features, self.in_features)
        return self.nearest_factors(gaussian(shape, dense_std(std, self.in_features), generator))

"""low_rank: W = U V (arXiv 2407.09835, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from factorlm.config import check
from factorlm.layers.base import (
    Factor,
    StructureConfig,
    StructuredLinear,
    check_ratio,
    register_structure,
    round_to_multiple,
)
from factorlm.layers.initialization import dense_std, gaussian, structure_aware_std
from factorlm.layers.projection import balanced_svd
from factorlm.ops.low_rank import low_rank, low_rank_dense


@register_structure("low_rank")
@dataclass(frozen=True, kw_only=True)
class LowRankConfig(StructureConfig):
    """W (O, I) = U (O, R) V (R, I)."""

    rank: int | None = None
    """R, 1 <= R <= min(I, O). None until ``for_param_ratio`` solves it."""

    def __post_init__(self) -> None:
        check(self.rank is None or self.rank >= 1, f"rank={self.rank} must be at least 1")

    def validate(self, in_features: int, out_features: int) -> None:
        """1 <= R <= min(I, O)."""
        self._rank(in_features, out_features)

    def _rank(self, in_features: int, out_features: int) -> int:
        check(self.rank is not None, "rank=None must be a number, or be solved for a param_ratio")
        assert self.rank is not None
        limit = min(in_features, out_features)
        check(
            self.rank <= limit, f"rank={self.rank} exceeds min(in_features, out_features)={limit}"
        )
        return self.rank

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """V then U."""
        rank = self._rank(in_features, out_features)
        return Factor("V", 1, in_features, rank), Factor("U", 1, rank, out_features)

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """2 O R I."""
        return 2 * out_features * self._rank(in_features, out_features) * in_features

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """R = ratio I O / (I + O), to the nearest multiple, not over min(I, O)."""
        check_ratio(ratio, multiple_of)
        exact = ratio * in_features * out_features / (in_features + out_features)
        limit = min(in_features, out_features)
        return self.replace(rank=round_to_multiple(exact, multiple_of, at_most=limit))

    def build(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        """Allocate and initialise."""
        return LowRankLinear(
            self, in_features, out_features, bias=bias, device=device, dtype=dtype
        )


@final
class LowRankLinear(StructuredLinear):
    """y = U(Vx) + b."""

    config: LowRankConfig

    def __init__(
        self,
        config: LowRankConfig,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            config, in_features, out_features, bias=bias, device=device, dtype=dtype
        )
        first, second = self.factors
        self.V = nn.Parameter(
            torch.empty(first.fan_out, first.fan_in, device=device, dtype=dtype)
        )
        self.U = nn.Parameter(
            torch.empty(second.fan_out, second.fan_in, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        return low_rank(x, self.V, self.U, self.bias)

    def to_dense(self) -> Tensor:
        """U V, (O, I)."""
        return low_rank_dense(self.V, self.U)

    @torch.no_grad()
    def project_(self, weight: Tensor) -> Self:
        """The truncated SVD of ``weight`` (O, I)."""
        U, V = balanced_svd(weight, self.U.shape[1])
        self.U.copy_(U)
        self.V.copy_(V)
        return self

    def reset_factors(self, std: float | None, generator: torch.Generator | None) -> None:
        """``paper``: the truncated SVD of a dense draw; ``structure_aware``: Gaussian factors."""
        if self.V.is_meta:
            return
        if self.config.init == "paper":
            shape = (self.out_features, self.in_features)
            self.project_(gaussian(shape, dense_std(std, self.in_features), generator))
            return
        for parameter, factor in zip((self.V, self.U), self.factors, strict=True):
            draw = gaussian(tuple(parameter.shape), structure_aware_std(factor), generator)
            parameter.copy_(draw)

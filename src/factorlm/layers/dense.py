"""dense: the limit case, one full factor behind the same contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.layers.base import (
    Factor,
    StructureConfig,
    StructuredLinear,
    check_ratio,
    register_structure,
)
from factorlm.layers.initialization import dense_std, gaussian, structure_aware_std


@register_structure("dense")
@dataclass(frozen=True, kw_only=True)
class DenseConfig(StructureConfig):
    """W (O, I) as it is."""

    def validate(self, in_features: int, out_features: int) -> None:
        """Every size fits."""

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """W alone."""
        return (Factor("W", 1, in_features, out_features),)

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """Nothing to compute."""
        return 0

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """The share of a dense weight is 1, whatever is asked for."""
        check_ratio(ratio, multiple_of)
        return self

    def build(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DenseLinear:
        """Allocate and initialise."""
        return DenseLinear(self, in_features, out_features, bias=bias, device=device, dtype=dtype)


@final
class DenseLinear(StructuredLinear):
    """y = W x + b."""

    config: DenseConfig

    def __init__(
        self,
        config: DenseConfig,
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
        self.W = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        return linear(x, self.W, self.bias)

    def to_dense(self) -> Tensor:
        """W itself, (O, I)."""
        return self.W

    @torch.no_grad()
    def project_(self, weight: Tensor) -> Self:
        """Copy ``weight`` (O, I)."""
        self.W.copy_(weight)
        return self

    def reset_factors(self, std: float | None, generator: torch.Generator | None) -> None:
        """Gaussian with ``std``, or the structure-aware one."""
        if self.W.is_meta:
            return
        if self.config.init == "structure_aware":
            std = structure_aware_std(self.factors[0])
        shape = (self.out_features, self.in_features)
        self.W.copy_(gaussian(shape, dense_std(std, self.in_features), generator))

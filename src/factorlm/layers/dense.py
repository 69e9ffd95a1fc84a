"""dense: the limit case, one full factor behind the same contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.layers.base import StructuredLinear
from factorlm.layers.config import Factor, StructureConfig, check_ratio, register_structure
from factorlm.layers.initialization import dense_std, gaussian


@dataclass(frozen=True, kw_only=True)
class DenseConfig(StructureConfig):
    """W (O, I) as it is."""

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """W alone."""
        return (Factor("W", (out_features, in_features)),)

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """Nothing to compute."""
        return 0

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """The share of a dense weight is 1, whatever is asked for."""
        check_ratio(ratio, multiple_of)
        return self


@register_structure("dense", DenseConfig)
@final
class DenseLinear(StructuredLinear):
    """y = W x + b."""

    config: DenseConfig
    W: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        return linear(x, self.W, self.bias)

    def to_dense(self) -> Tensor:
        """W itself, (O, I)."""
        return self.W

    def matrices(self) -> tuple[Tensor]:
        """W."""
        return (self.W,)

    def nearest_factors(self, weight: Tensor) -> tuple[Tensor]:
        """``weight`` itself."""
        return (weight,)

    def draw_factors(self, std: float | None, generator: torch.Generator | None) -> tuple[Tensor]:
        """Gaussian."""
        shape = (self.out_features, self.in_features)
        return (gaussian(shape, dense_std(std, self.in_features), generator),)

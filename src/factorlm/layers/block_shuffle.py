"""block_shuffle, or Monarch: two block-diagonal factors around a permutation.

arXiv 2406.16450, for rectangular weights.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from factorlm.errors import ConfigError
from factorlm.layers.base import StructuredLinear
from factorlm.layers.config import (
    Factor,
    StructureConfig,
    check_count,
    check_divides,
    check_ratio,
    register_structure,
)
from factorlm.layers.initialization import orthogonal_polar
from factorlm.layers.projection import balanced_svd
from factorlm.ops.block_shuffle import (
    block_shuffle,
    block_shuffle_dense,
    block_shuffle_gelu,
    block_shuffle_products,
    num_rounds,
)


@dataclass(frozen=True, kw_only=True)
class BlockShuffleConfig(StructureConfig):
    """W (O, I): blocks (m/G, I/G), a shuffle of the m values between, blocks (O/G, m/G)."""

    num_blocks: int | None = None
    """G; divides I and O. None until ``for_param_ratio`` chooses it."""
    output_shuffle: bool = True
    """Spread each block's outputs over the whole output, as in the papers. Without it quality is
    the same (published ablation) and a copy is saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_blocks is not None:
            check_count("num_blocks", self.num_blocks)

    def validate(self, in_features: int, out_features: int) -> None:
        """G divides I and O. Warns when G² > m: some input blocks cannot reach some outputs."""
        super().validate(in_features, out_features)
        first, _ = self.factors(in_features, out_features)
        if first.num_blocks > first.fan_out:
            warnings.warn(
                f"num_blocks={self.num_blocks}: its square exceeds min(in_features, out_features)="
                f"{min(in_features, out_features)}, so parts of the dense weight are always zero",
                stacklevel=4,
            )

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """first then second."""
        blocks = self.num_blocks
        if blocks is None:
            raise ConfigError("num_blocks=None must be a number, or be chosen for a param_ratio")
        check_divides(blocks, in_features=in_features, out_features=out_features)
        hidden = min(in_features, out_features) // blocks
        return (
            Factor("first", (blocks, hidden, in_features // blocks)),
            Factor("second", (blocks, out_features // blocks, hidden)),
        )

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """2 m O I / G² where G² divides m; otherwise what the padded sub-blocks cost."""
        first, _ = self.factors(in_features, out_features)
        return 2 * out_features * in_features * num_rounds(first.num_blocks, first.fan_out)

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """The common divisor G of I and O whose share (1 + m/max(I, O))/G is nearest to ``ratio``.

        The only free size is G, so ``multiple_of`` plays no part.
        """
        check_ratio(ratio, multiple_of)
        largest = math.gcd(in_features, out_features)
        divisors = [blocks for blocks in range(1, largest + 1) if largest % blocks == 0]
        undivided = 1 + min(in_features, out_features) / max(in_features, out_features)
        nearest = min(divisors, key=lambda blocks: abs(undivided / blocks - ratio))
        return self.replace(num_blocks=nearest)


@register_structure("block_shuffle", BlockShuffleConfig)
@final
class BlockShuffleLinear(StructuredLinear):
    """y = shuffle(second(shuffle(first x))) + b."""

    config: BlockShuffleConfig
    first: nn.Parameter
    second: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        shuffle = self.config.output_shuffle
        return block_shuffle(x, self.first, self.second, self.bias, output_shuffle=shuffle)

    def fused_gelu(self, x: Tensor) -> Tensor | None:
        """gelu(self(x)), (*, I) -> (*, O), where a kernel takes it: without the last shuffle."""
        if self.config.output_shuffle:
            return None
        return block_shuffle_gelu(x, self.first, self.second, self.bias)

    def to_dense(self) -> Tensor:
        """(O, I)."""
        shuffle = self.config.output_shuffle
        return block_shuffle_dense(self.first, self.second, output_shuffle=shuffle)

    def products(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """The sub-blocks; where the outputs land plays no part."""
        return block_shuffle_products(*factors)

    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The truncated SVD of each sub-block (O/G, I/G) of the G x G grid.

        Sub-block (p, q), of input block p and group q, has as many ranks as there are hidden
        values j of block p with j mod G = q: they differ by one where G² does not divide m.
        """
        blocks, hidden, _ = self.first.shape
        first, second = weight.new_zeros(self.first.shape), weight.new_zeros(self.second.shape)
        left, right = balanced_svd(self._sub_blocks(weight), -(-hidden // blocks))
        for p in range(blocks):
            for q in range(blocks):
                start = (q - p * hidden) % blocks
                rank = len(range(start, hidden, blocks))
                slot = (p * hidden + start) // blocks
                first[p, start::blocks] = right[p, q, :rank]
                second[q, :, slot : slot + rank] = left[p, q, :, :rank]
        return first, second

    def _sub_blocks(self, weight: Tensor) -> Tensor:
        """(O, I) -> (G, G, O/G, I/G): [p, q] maps input block p to the outputs of group q."""
        blocks = self.first.shape[0]
        grid = weight.unflatten(1, (blocks, -1))
        if self.config.output_shuffle:
            return grid.unflatten(0, (-1, blocks)).permute(2, 1, 0, 3)
        return grid.unflatten(0, (blocks, -1)).permute(2, 0, 1, 3)

    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The orthogonal polar factor of each block; ``std`` plays no part."""
        first, second = self.factors
        return orthogonal_polar(first.shape, generator), orthogonal_polar(second.shape, generator)

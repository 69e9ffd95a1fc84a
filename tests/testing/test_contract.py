"""The battery on a structure of a user's own, and on wrong ones, each caught by a named test."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Self, final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factorlm.config import check
from factorlm.layers import Factor, StructureConfig, StructuredLinear, register_structure
from factorlm.testing import StructuredLinearContract


@dataclass(frozen=True, kw_only=True)
class KroneckerConfig(StructureConfig):
    """W (O, I) = A (a_out, a_in) ⊗ B (O/a_out, I/a_in)."""

    a_out: int = 1
    a_in: int = 1

    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        check(in_features % self.a_in == 0, f"a_in={self.a_in} does not divide {in_features}")
        check(out_features % self.a_out == 0, f"a_out={self.a_out} does not divide {out_features}")
        b_shape = (out_features // self.a_out, in_features // self.a_in)
        return Factor("B", b_shape), Factor("A", (self.a_out, self.a_in))

    def flops_per_token(self, in_features: int, out_features: int) -> int:
        B, A = self.factors(in_features, out_features)
        return 2 * (self.a_in * B.num_params + B.fan_out * A.num_params)

    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        return 0

    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        check(ratio > 0, f"ratio={ratio} must be above 0")
        check(multiple_of >= 1, f"multiple_of={multiple_of} must be at least 1")
        divisors = ([d for d in range(1, n + 1) if n % d == 0] for n in (out_features, in_features))
        solutions = [self.replace(a_out=o, a_in=i) for o, i in itertools.product(*divisors)]
        wanted = ratio * in_features * out_features
        return min(solutions, key=lambda s: abs(s.num_params(in_features, out_features) - wanted))


class KroneckerBase(StructuredLinear):
    config: KroneckerConfig
    A: nn.Parameter
    B: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.unflatten(-1, (self.A.shape[1], self.B.shape[1])) @ self.B.t()
        y = (self.A @ hidden).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_dense(self) -> Tensor:
        return torch.kron(self.A, self.B)

    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        a_shape, b_shape = self.A.shape, self.B.shape
        left, values, right = torch.linalg.svd(rearranged(weight, a_shape, b_shape))
        root = values[0].sqrt()
        return root * right[0].view(b_shape), root * left[:, 0].view(a_shape)

    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        return tuple(torch.randn(f.shape, generator=generator) for f in self.factors)


def rearranged(weight: Tensor, a_shape: torch.Size, b_shape: torch.Size) -> Tensor:
    """Row (i, j): sub-block (i, j) of ``weight``, flat (Van Loan and Pitsianis, 1993)."""
    blocks = weight.view(a_shape[0], b_shape[0], a_shape[1], b_shape[1])
    return blocks.permute(0, 2, 1, 3).reshape(a_shape.numel(), b_shape.numel())


@register_structure("test_kronecker", KroneckerConfig)
@final
class KroneckerLinear(KroneckerBase):
    """Right in everything."""


class TestKronecker(StructuredLinearContract):
    cases = (
        (KroneckerConfig(a_out=3, a_in=2), 8, 9),
        (KroneckerConfig(a_out=5, a_in=3), 15, 10),
        (KroneckerConfig(a_out=2, a_in=2, init="structure_aware"), 6, 4),
    )

    def best_residual(self, config: KroneckerConfig, weight: np.ndarray) -> float:
        rows = [
            block.ravel()
            for panel in np.split(weight, config.a_out, axis=0)
            for block in np.split(panel, config.a_in, axis=1)
        ]
        return float((np.linalg.svd(np.stack(rows), compute_uv=False)[1:] ** 2).sum())


class LosesEntries(KroneckerBase):
    def products(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        left, right = super().products(*factors)
        return left[1:], right[1:]


class IgnoresGivenFactors(KroneckerBase):
    def products(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        return super().products(self.B, self.A)


class LeavesOutMatrix(KroneckerBase):
    def matrices(self) -> tuple[Tensor, ...]:
        return torch.kron(self.A, torch.eye(len(self.B), dtype=self.B.dtype)), self.B


class Swapped(KroneckerBase):
    def to_dense(self) -> Tensor:
        return torch.kron(self.A.flip(0), self.B)


class ForgetsBias(KroneckerBase):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - (0 if self.bias is None else self.bias)


class DetachedFactor(KroneckerBase):
    def forward(self, x: Tensor) -> Tensor:
        dense = torch.kron(self.A.detach(), self.B)
        return torch.nn.functional.linear(x, dense, self.bias)


class DetachedDense(KroneckerBase):
    def to_dense(self) -> Tensor:
        return torch.kron(self.A, self.B.detach())


class ViewsInput(KroneckerBase):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, self.in_features).view(x.shape))


class PromotesUnderAutocast(KroneckerBase):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class BreaksGraph(KroneckerBase):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.sum().item() > -1e9 else 0.0)


class NearlyBest(KroneckerBase):
    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(1.001 * factor for factor in super().nearest_factors(weight))


class Unbalanced(KroneckerBase):
    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        B, A = super().nearest_factors(weight)
        return 2 * B, A / 2


class WastesFlops(KroneckerBase):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.to_dense(), self.bias)


class KeepsBuffer(KroneckerBase):
    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        self.register_buffer("index", torch.arange(3), persistent=False)
        return super().draw_factors(std, generator)


class IgnoresGenerator(KroneckerBase):
    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        return tuple(torch.randn(f.shape) for f in self.factors)


@pytest.mark.parametrize(
    ("layer", "test", "arguments"),
    [
        (Swapped, "test_forward_is_the_dense_product", {"leading": (2, 3), "bias": True}),
        (LosesEntries, "test_products_hold_every_entry_of_the_dense_weight", {}),
        (IgnoresGivenFactors, "test_products_hold_every_entry_of_the_dense_weight", {}),
        (LeavesOutMatrix, "test_matrices_are_all_of_the_map", {}),
        (ForgetsBias, "test_forward_is_the_dense_product", {"leading": (), "bias": True}),
        (DetachedFactor, "test_gradients_are_those_of_the_dense_path", {"tokens": 5}),
        (DetachedDense, "test_gradcheck", {}),
        (ViewsInput, "test_forward_reads_any_strides", {}),
        (PromotesUnderAutocast, "test_autocast", {}),
        (PromotesUnderAutocast, "test_bf16", {}),
        (BreaksGraph, "test_compiles_in_one_graph", {"autocast": False}),
        (NearlyBest, "test_projection_is_the_best", {}),
        (NearlyBest, "test_projection_recovers_what_has_the_structure", {}),
        (NearlyBest, "test_projection_is_a_fixed_point", {}),
        (NearlyBest, "test_no_factors_nearby_are_better", {}),
        (Unbalanced, "test_projection_balances_the_factors", {}),
        (WastesFlops, "test_flops_are_those_that_torch_counts", {}),
        (KeepsBuffer, "test_parameters_are_the_factors", {}),
        (IgnoresGenerator, "test_meta_then_materialised_equals_built", {}),
    ],
)
def test_a_wrong_structure_is_caught(
    layer: type[StructuredLinear],
    test: str,
    arguments: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contract, case = TestKronecker(), TestKronecker.cases[0]
    getattr(contract, test)(case, **arguments)
    monkeypatch.setattr(KroneckerConfig, "layer", layer)
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(contract, test)(case, **arguments)


class MiscountsParams(KroneckerConfig):
    def num_params(self, in_features: int, out_features: int) -> int:
        return super().num_params(in_features, out_features) + 1


class MiscountsMerge(KroneckerConfig):
    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        return in_features * out_features


class MisnamesFactor(KroneckerConfig):
    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        B, A = super().factors(in_features, out_features)
        return B, Factor("A", (math.prod(A.shape), 1))


@pytest.mark.parametrize(
    ("config", "test"),
    [
        (MiscountsParams, "test_parameters_are_the_factors"),
        (MiscountsMerge, "test_merging_costs_what_is_stated"),
        (MisnamesFactor, "test_forward_is_the_dense_product"),
        (MiscountsParams, "test_config_survives_json"),
    ],
)
def test_a_wrong_config_is_caught(config: type[KroneckerConfig], test: str) -> None:
    arguments = {"leading": (3,), "bias": True} if "forward" in test else {}
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(TestKronecker(), test)((config(a_out=3, a_in=2), 8, 9), **arguments)

"""What a structure is tried on, and how inputs and layers are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor, nn

from factorlm.layers import StructureConfig, StructuredLinear

if TYPE_CHECKING:
    import numpy

Case = tuple[StructureConfig, int, int]


def build(case: Case, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> StructuredLinear:
    """The layer of ``case`` with a fixed draw and a bias that is not zero."""
    config, in_features, out_features = case
    layer = config.build(in_features, out_features, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    layer.reset_parameters(generator=generator)
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.randn(out_features, generator=generator))
    return layer


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(module: nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    """The gradients of a fixed random projection of ``output`` in ``x`` and all parameters."""
    cotangent = draw(*output.shape, seed=7).to(output.dtype)
    return list(torch.autograd.grad(output, [x, *module.parameters()], cotangent))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative, in Frobenius norm."""
    difference = actual.double() - expected.double()
    return (torch.linalg.norm(difference) / torch.linalg.norm(expected.double())).item()


class StructureCases:
    """Base of the parts: the cases, and the truth about projections."""

    cases: ClassVar[Sequence[Case]]
    """(config, in_features, out_features): small, odd and rectangular sizes, every option."""

    def best_residual(self, config: StructureConfig, weight: numpy.ndarray) -> float:
        """‖W − nearest‖² in Frobenius norm of the best approximation of ``weight`` (O, I)."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests that take ``case`` run for each, those that take ``first_case`` for the first."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=[_name(case) for case in self.cases])
        if "first_case" in metafunc.fixturenames:
            metafunc.parametrize("first_case", self.cases[:1], ids=[_name(self.cases[0])])


def _name(case: Case) -> str:
    config, in_features, out_features = case
    fields = "-".join(str(value) for value in config.to_dict().values())
    return f"{config.kind}-{fields}-{in_features}x{out_features}"

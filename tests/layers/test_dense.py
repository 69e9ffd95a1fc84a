"""dense: the contract where nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from factorlm.layers import DenseConfig
from factorlm.testing import StructuredLinearContract


class TestDense(StructuredLinearContract):
    cases = ((DenseConfig(), 8, 12), (DenseConfig(init="structure_aware"), 7, 3))

    def best_residual(self, config: DenseConfig, weight: np.ndarray) -> float:
        return 0.0


def test_is_a_linear() -> None:
    layer, linear = DenseConfig().build(8, 12), torch.nn.Linear(8, 12)
    layer.load_state_dict({"W": linear.weight.data, "bias": linear.bias.data})
    x = torch.randn(3, 8)
    assert_close(layer(x), linear(x), rtol=0, atol=0)


@pytest.mark.parametrize(("std", "expected"), [(0.02, 0.02), (None, (3 * 100) ** -0.5)])
def test_paper_init_has_the_given_scale(std: float | None, expected: float) -> None:
    layer = DenseConfig().build(100, 100)
    layer.reset_parameters(std=std)
    assert layer.W.std().item() == pytest.approx(expected, rel=0.05)
    assert not layer.bias.any()

"""Draws: the polar factor against its definition, independence of the default device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from factorlm.layers import Factor
from factorlm.layers.initialization import (
    dense_std,
    gaussian,
    orthogonal_polar,
    structure_aware_std,
)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (2, 4, 6), (5, 5)])
def test_polar_factor_times_a_positive_matrix_is_the_draw(shape: tuple[int, ...]) -> None:
    drawn, polar = gaussian(shape, 1.0, seeded()), orthogonal_polar(shape, seeded())
    if shape[-2] < shape[-1]:
        drawn, polar = drawn.mT, polar.mT
    assert_close(polar.mT @ polar, torch.eye(polar.shape[-1]).expand((*polar.mT.shape[:-1], -1)))
    stretch = polar.mT @ drawn
    assert_close(stretch, stretch.mT, rtol=1e-4, atol=1e-5)
    assert (torch.linalg.eigvalsh(stretch) > -1e-4).all()
    assert_close(polar @ stretch, drawn, rtol=1e-4, atol=1e-5)


def test_gaussian_has_the_std_and_is_drawn_on_the_cpu() -> None:
    with torch.device("meta"):
        values = gaussian((200, 200), 0.3, seeded())
    assert values.device.type == "cpu"
    assert values.dtype == torch.float32
    assert values.std().item() == pytest.approx(0.3, rel=0.02)


def test_dense_std_is_that_of_linear() -> None:
    assert dense_std(0.02, 100) == 0.02
    weight = torch.nn.Linear(400, 400).weight
    assert dense_std(None, 400) == pytest.approx(weight.std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 2), 2**-0.5), ((2, 8), 8**-0.5 * 0.5), ((4, 2, 8), 8**-0.5 * 0.5), ((5, 5), 5**-0.5)],
)
def test_structure_aware_std(shape: tuple[int, ...], expected: float) -> None:
    np.testing.assert_allclose(structure_aware_std(Factor("W", shape)), expected)

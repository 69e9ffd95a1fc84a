"""Newton-Schulz against an exact SVD, against its own polynomial, and its count of FLOPs."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factorlm.optim import newton_schulz
from factorlm.optim.newton_schulz import LARGEST_SINGULAR_VALUE, newton_schulz_flops

SHAPES = [(6, 6), (5, 9), (9, 5), (1, 7), (3, 4, 6), (2, 6, 4), (2, 3, 4, 5)]


def draw(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw((size, size), seed=seed))[0]


def five_steps(values: np.ndarray) -> np.ndarray:
    """The polynomial as a formula of numbers."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrix = draw(shape)
    found = newton_schulz(matrix)
    assert found.shape == matrix.shape
    pairs = zip(matrix.reshape(-1, *shape[-2:]), found.reshape(-1, *shape[-2:]), strict=True)
    for block, result in pairs:
        left, values, right = np.linalg.svd(block.numpy(), full_matrices=False)
        wanted = left * five_steps(values / np.sqrt((values**2).sum())) @ right
        np.testing.assert_allclose(result.numpy(), wanted, rtol=0, atol=1e-10)


def test_what_five_steps_make_of_singular_values() -> None:
    values = five_steps(np.linspace(0, 1, 400_001))
    assert LARGEST_SINGULAR_VALUE - 0.001 < values.max() < LARGEST_SINGULAR_VALUE
    assert values[4_000:].min() > 0.68


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 24)])
def test_rounding_stays_small_and_under_the_bound(shape: tuple[int, ...], precision: str) -> None:
    matrix = draw(shape, dtype=torch.float32)
    found = newton_schulz(matrix, precision=precision)  # type: ignore[arg-type]
    assert found.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    exact = newton_schulz(matrix.double())
    error = (found.double() - exact).norm() / exact.norm()
    assert error < (0.05 if precision == "bf16" else 1e-4)
    assert torch.linalg.svdvals(found.double()).max() < LARGEST_SINGULAR_VALUE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("is_fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_automatic_precision_is_bf16_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_fast: bool, precision: str
) -> None:
    module = importlib.import_module("factorlm.optim.newton_schulz")  # a function has its name
    monkeypatch.setattr(module, "has_fast_bf16", lambda _: is_fast)
    matrix = draw((4, 6), dtype=torch.float32).to(dtype)
    wanted = newton_schulz(matrix, precision=precision)  # type: ignore[arg-type]
    torch.testing.assert_close(newton_schulz(matrix), wanted, rtol=0, atol=0)  # and their dtypes
    assert torch.equal(matrix, draw((4, 6), dtype=torch.float32).to(dtype))  # it is not written to


@pytest.mark.parametrize("factor", [1e-4, 3.0, 1e6])
def test_the_scale_of_the_matrix_does_not_matter(factor: float) -> None:
    matrix = draw((4, 6, 5))
    torch.testing.assert_close(
        newton_schulz(matrix * factor), newton_schulz(matrix), rtol=0, atol=1e-12
    )


def test_rotations_of_the_matrix_rotate_the_result() -> None:
    matrix, left, right = draw((6, 9)), orthogonal(6, 1), orthogonal(9, 2)
    wanted = left @ newton_schulz(matrix) @ right
    torch.testing.assert_close(newton_schulz(left @ matrix @ right), wanted, rtol=0, atol=1e-10)


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_pytorch_counts(shape: tuple[int, ...]) -> None:
    with FlopCounterMode(display=False) as counter:
        newton_schulz(draw(shape))
    assert newton_schulz_flops(shape) == counter.get_total_flops()

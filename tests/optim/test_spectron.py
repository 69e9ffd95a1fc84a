"""Spectron: how far the product moves, the estimate of σ, and a step written out in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factorlm.errors import ConfigError
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    StructureConfig,
    StructuredLinear,
)
from factorlm.optim import FactorOptimizer, newton_schulz
from factorlm.optim.spectral import START_STEPS, power_step, power_steps, start_vectors
from factorlm.optim.spectron import bounded_rate, spectral_norm

STRUCTURES: dict[str, StructureConfig] = {
    "low_rank": LowRankConfig(rank=6),
    "block_shuffle": BlockShuffleConfig(num_blocks=4),
    "block_shuffle_straight": BlockShuffleConfig(num_blocks=2, output_shuffle=False),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=8),
}
SIZES = [(16, 24), (24, 16)]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_layer(config: StructureConfig, sizes: tuple[int, int], seed: int) -> StructuredLinear:
    """Factors of no particular size, each with a gradient."""
    layer = config.build(*sizes, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(tuple(parameter.shape), seed + index) / 2)
            parameter.grad = draw(tuple(parameter.shape), seed + 50 + index)
    return layer


def largest(matrix: Tensor) -> float:
    """The exact spectral norm; of a block-diagonal factor too."""
    return float(np.linalg.svd(matrix.detach().numpy(), compute_uv=False).max())


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "polar": polar,
    "newton_schulz": lambda gradient: newton_schulz(gradient) / 1.203,
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("limit", [1e-4, 0.3, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_product_moves_at_most_the_limit_with_exact_norms(
    direction: str, name: str, sizes: tuple[int, int], limit: float
) -> None:
    for seed in range(5):
        layer = random_layer(STRUCTURES[name], sizes, seed)
        before = layer.to_dense().detach()
        pair = list(layer.parameters())
        norms = [torch.tensor(largest(factor)) for factor in pair]
        assert limit <= sum(norms) + 1
        rate = bounded_rate(limit, *norms)
        with torch.no_grad():
            for factor in pair:
                assert factor.grad is not None
                factor -= rate * DIRECTIONS[direction](factor.grad)
        moved = largest(layer.to_dense() - before)
        assert 0.2 * limit < moved <= limit * (1 + 1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_product_moves_at_most_the_limit_in_every_step(
    name: str, sizes: tuple[int, int]
) -> None:
    """As it runs: Newton-Schulz, power iteration warm-started over ten steps, momentum."""
    layer = random_layer(STRUCTURES[name], sizes, 3)
    group = {"params": list(layer.parameters()), "rule": "spectron", "weight_decay": 0.0}
    optimizer = FactorOptimizer([group | {"adjust_lr_fn": None}], lr=0.2)
    for step in range(10):
        before = layer.to_dense().detach()
        optimizer.step()
        moved = largest(layer.to_dense() - before)
        # The estimate of σ may be 2 % low.
        assert 0.01 * 0.2 < moved <= 0.2 * 1.02
        for index, parameter in enumerate(layer.parameters()):
            parameter.grad = draw(tuple(parameter.shape), 100 * step + index)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_limit_is_adamws_rate_on_the_sizes_of_the_product(
    name: str, sizes: tuple[int, int]
) -> None:
    """With match_rms_adamw, as with lr = 0.2 √max(I, O) lr and no adjustment."""
    found, wanted = (random_layer(STRUCTURES[name], sizes, 3) for _ in range(2))
    rate = 0.2 * math.sqrt(max(sizes)) * 0.01
    for layer, lr, adjust in ((found, 0.01, "match_rms_adamw"), (wanted, rate, None)):
        group = {"params": list(layer.parameters()), "rule": "spectron", "weight_decay": 0.0}
        FactorOptimizer([group | {"adjust_lr_fn": adjust}], lr=lr).step()
    for mine, theirs in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)


def test_two_steps_are_those_of_the_paper() -> None:
    """In NumPy, from exact singular values; what is left is the error of power iteration."""
    layer = random_layer(STRUCTURES["low_rank"], (16, 24), 3)
    pair = list(layer.parameters())
    wanted = [factor.detach().numpy().copy() for factor in pair]
    momenta = [np.zeros_like(factor) for factor in wanted]
    group = {"params": pair, "rule": "spectron", "adjust_lr_fn": None, "weight_decay": 0.5}
    optimizer = FactorOptimizer([group], lr=0.1)
    for _ in range(2):
        optimizer.step()
        norms = [np.linalg.norm(factor, 2) for factor in wanted]
        rho = 0.1 / (norms[0] + norms[1] + 1)
        for factor, momentum, parameter in zip(wanted, momenta, pair, strict=True):
            gradient = parameter.grad.numpy()  # type: ignore[union-attr]
            momentum[:] = 0.95 * momentum + 0.05 * gradient
            left, values, right = np.linalg.svd(
                0.05 * gradient + 0.95 * momentum, full_matrices=False
            )
            values /= np.linalg.norm(values)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            factor *= 1 - 0.1 * 0.5
            factor -= rho * (left * values @ right) / 1.203
    for parameter, exact in zip(pair, wanted, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (128, 128), (4, 64, 96), (1, 5)])
def test_power_iteration_starts_within_two_percent_and_follows(shape: tuple[int, ...]) -> None:
    for seed in range(5):
        matrix, state = draw(shape, seed), {}  # type: ignore[var-annotated]
        for step in range(4):
            exact = largest(matrix)
            estimate = float(spectral_norm(matrix, state))
            assert 0.98 * exact <= estimate <= exact * (1 + 1e-12)
            matrix = matrix + 0.01 * draw(shape, 100 + step)


def test_a_warm_start_is_better_than_a_cold_one() -> None:
    matrix = draw((96, 128))
    _, warm = power_steps(matrix, start_vectors(matrix), START_STEPS)
    cold, _ = power_step(matrix, start_vectors(matrix))
    assert float(cold) < 0.9 * largest(matrix) < 0.98 * float(power_step(matrix, warm)[0])


def test_power_iteration_outlives_a_matrix_of_zeros() -> None:
    state: dict[str, Tensor] = {}
    assert spectral_norm(torch.zeros(2, 3, 4), state) == 0
    matrix = draw((2, 3, 4)).float()
    for _ in range(50):
        estimate = spectral_norm(matrix, state)
    assert float(estimate) == pytest.approx(largest(matrix), rel=0.02)


def test_a_pair_moves_only_where_both_factors_have_gradients() -> None:
    layers = [random_layer(STRUCTURES["low_rank"], (16, 24), seed) for seed in (3, 7)]
    layers[0].get_parameter("U").grad = None
    before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = FactorOptimizer([{"params": parameters, "rule": "spectron"}], lr=0.1)
    optimizer.step()
    for layer, old, moves in zip(layers, before, (False, True), strict=True):
        for parameter, start in zip(layer.parameters(), old, strict=True):
            assert torch.equal(parameter, start) != moves
            assert (len(optimizer.state.get(parameter, {})) == 2) == moves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": [torch.zeros(2, 3)]}, r"len\(params\)=1 .* must be even"),
        (
            {"params": [torch.zeros(4, 2), torch.zeros(2, 3)]},
            "must be a pair in order of application; 4 outputs meet 3 inputs",
        ),
        ({"adjust_lr_fn": "original"}, "adjust_lr_fn='original' of a group with rule='spectron'"),
        ({"momentum": -0.1}, "momentum=-0.1 of a group with rule='spectron' must lie"),
    ],
)
def test_what_it_refuses(options: dict[str, object], message: str) -> None:
    pair = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2))]
    with pytest.raises(ConfigError, match=message):
        FactorOptimizer([{"params": pair, "rule": "spectron"} | options])

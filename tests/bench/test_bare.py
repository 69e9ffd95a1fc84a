"""Bare matmuls are those of a step, all of them and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from factorlm.bench.bare import bare_matmuls, factors_of
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    LowRankConfig,
    StructureConfig,
)

IN, OUT = 16, 64
CONFIGS = [LowRankConfig(rank=8), BlockDenseConfig(rank=8), BlockShuffleConfig(num_blocks=4)]
"""Structures of matrices, of blocks, of both."""


def operands(num_tokens: int = 11) -> tuple[Tensor, Tensor]:
    x = torch.randn(num_tokens, IN, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(num_tokens, OUT, dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: type(config).__name__)
def test_they_give_the_output_and_the_gradients_of_a_step(config: StructureConfig) -> None:
    layer = config.build(IN, OUT, bias=False, dtype=torch.float64)
    x, slope = operands()
    factors = factors_of(layer)
    y = layer(x)
    wanted = torch.autograd.grad(y, [*reversed(factors), x], slope)
    found = bare_matmuls(factors, x, slope, "forward+backward")()
    assert isinstance(found, list)
    del found[2]  # the gradient between the factors
    torch.testing.assert_close(found, [y.detach(), *wanted])
    forward = bare_matmuls(factors, x, slope, "forward")()
    torch.testing.assert_close(forward, [y.detach()])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_they_are_all_the_products_of_a_step(config: StructureConfig) -> None:
    layer = config.build(IN, OUT, bias=False, dtype=torch.float64)
    x, slope = operands()
    with FlopCounterMode(display=False) as step:
        layer(x).backward(slope)
    with FlopCounterMode(display=False) as alone:
        bare_matmuls(factors_of(layer), x, slope, "forward+backward")()
    assert alone.get_total_flops() == step.get_total_flops()
    assert alone.get_total_flops() == 3 * len(x) * config.flops_per_token(IN, OUT)


def test_factors_of_layers_in_turn() -> None:
    up, down = nn.Linear(IN, OUT), LowRankConfig(rank=8).build(OUT, IN)
    assert [tuple(factor.shape) for factor in factors_of(up, down)] == [
        (OUT, IN),
        (8, OUT),
        (IN, 8),
    ]
    assert factors_of(up, DenseConfig().build(OUT, IN)) == ()

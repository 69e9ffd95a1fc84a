"""Steps of optimizers and of guides, which must not make the host wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    SelfGuidedLinear,
    StructureConfig,
)
from factorlm.optim import RULES, FactorOptimizer, build_optimizer

PAIRS = [(8, 32), (48, 8)]
BLOCKS = [(4, 8, 8), (4, 12, 8)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "adamw": [(48, 32), (32,), ()],
    "muon": [(48, 32), *BLOCKS],
    "spectron": [*PAIRS, *BLOCKS],
    "lora_muon": PAIRS,
}
STRUCTURES: list[StructureConfig] = [
    LowRankConfig(rank=8),
    BlockShuffleConfig(num_blocks=4),
    BlockDenseConfig(num_blocks=4, rank=8),
]


@contextmanager
def no_sync() -> Iterator[None]:
    """Let PyTorch raise where it would wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device="cuda")


def trained(rule: str) -> FactorOptimizer:
    """Parameters with a gradient; before the first step."""
    parameters = [nn.Parameter(draw(shape)) for shape in SHAPES[rule]]
    for parameter in parameters:
        parameter.grad = draw(tuple(parameter.shape))
    return FactorOptimizer([{"params": parameters, "rule": rule}], lr=0.01)


def test_the_guard_sees_a_read_and_every_rule_has_its_shapes() -> None:
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        draw((2,)).sum().item()
    assert SHAPES.keys() == set(RULES)


@pytest.mark.parametrize("rule", SHAPES)
def test_a_warm_step_of_every_rule(rule: str) -> None:
    optimizer = trained(rule)
    optimizer.step()
    with no_sync():
        optimizer.step()


@pytest.mark.parametrize("rule", SHAPES)
def test_a_first_step_of_every_rule(rule: str) -> None:
    """After one of another optimizer: libraries are loaded by then."""
    trained(rule).step()
    optimizer = trained(rule)
    with no_sync():
        optimizer.step()


def test_a_warm_step_of_pytorchs_adamw() -> None:
    model = nn.Linear(32, 48, device="cuda")
    optimizer = build_optimizer(model, kind="adamw", learning_rate=0.01)
    for parameter in model.parameters():
        parameter.grad = draw(tuple(parameter.shape))
    optimizer.step()
    with no_sync():
        optimizer.step()


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("skipped", [False, True])
def test_alpha_is_set_and_a_step_taken(structure: StructureConfig, skipped: bool) -> None:
    layer = SelfGuidedLinear(structure.build(32, 48, device="cuda"))
    x = draw((64, 32))
    layer(x).sum().backward()
    with no_sync():
        layer.set_alpha(0.5, skipped=skipped)
        layer(x).sum().backward()

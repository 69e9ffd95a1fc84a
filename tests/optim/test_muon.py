"""The rule of matrices against ``torch.optim.Muon``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from factorlm.errors import ConfigError
from factorlm.optim import FactorOptimizer


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], scale: float) -> None:
    """Four steps with the same random gradients, whatever the optimizer."""
    for step in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = scale * draw(tuple(parameter.shape), 100 * step + index)
        optimizer.step()


def ours(parameters: list[nn.Parameter], **options: object) -> FactorOptimizer:
    """In bf16 also where that is slow: torch.optim.Muon computes in nothing else."""
    group = {"params": parameters, "rule": "muon", "precision": "bf16"}
    return FactorOptimizer([group | options], lr=0.02)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_matrices_are_bit_equal_to_torch(adjust: str, decay: float) -> None:
    shapes = [(6, 6), (16, 40), (40, 16), (33, 7)]
    mine = [nn.Parameter(draw(shape, 7)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    optimizer = ours(mine, weight_decay=decay, adjust_lr_fn=adjust)
    train(optimizer, mine, 1.0)
    muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=decay, adjust_lr_fn=adjust)
    train(muon, theirs, 1.0)
    for found, wanted in zip(mine, theirs, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found, draw(tuple(found.shape), 7))
        buffer = optimizer.state[found]["momentum_buffer"]
        assert torch.equal(buffer, muon.state[wanted]["momentum_buffer"])


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(4, 16, 24), (3, 24, 16), (2, 2, 8, 12)])
def test_each_block_moves_as_torch_moves_it_alone(shape: tuple[int, ...], adjust: str) -> None:
    factor = nn.Parameter(draw(shape, 7))
    blocks = factor.detach().clone().flatten(0, -3)
    train(ours([factor], weight_decay=0.3, adjust_lr_fn=adjust), [factor], 1.0)
    for index, start in enumerate(blocks):
        block = nn.Parameter(start.clone())
        muon = torch.optim.Muon([block], lr=0.02, weight_decay=0.3, adjust_lr_fn=adjust)
        for step in range(4):
            block.grad = draw(shape, 100 * step).flatten(0, -3)[index]
            muon.step()
        # A batched matmul may add in another order, and then some bf16 sums round to a neighbour,
        # 2^-8 away: a few hundredths of a step, whose entries are some lr x 0.2.
        moved = factor.detach().flatten(0, -3)[index]
        torch.testing.assert_close(moved, block.detach(), rtol=0, atol=0.02 * 0.2 * 0.05)


def test_the_scale_of_gradients_does_not_matter() -> None:
    small, large = nn.Parameter(draw((6, 9), 7).double()), nn.Parameter(draw((6, 9), 7).double())
    for parameter, scale in ((small, 1e-3), (large, 1e3)):
        parameter.grad = scale * draw((6, 9), 1).double()
        ours([parameter]).step()
    torch.testing.assert_close(small, large, rtol=0, atol=1e-12)
    assert not torch.equal(small, draw((6, 9), 7).double())


def test_a_step_has_the_rms_that_the_adjustment_is_named_after() -> None:
    """Orthogonal (a, b) has RMS 1/√max(a, b); AdamW's updates have about 0.2 lr."""
    parameter = nn.Parameter(torch.zeros(32, 64))
    parameter.grad = draw((32, 64), 1)
    ours([parameter]).step()
    rms = float(parameter.detach().square().mean().sqrt())
    assert 0.68 < rms / (0.2 * 0.02) < 1.203


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjust_lr_fn": None}, "adjust_lr_fn=None of a group with rule='muon' must be one of"),
        ({"momentum": 1.0}, r"momentum=1.0 of a group with rule='muon' must lie in \[0, 1\)"),
        ({"precision": "fp16"}, "precision='fp16' of a group with rule='muon' must be one of"),
        ({"params": [torch.zeros(3)]}, r"shape=\(3,\) of a group with rule='muon' must have two"),
        ({"params": [torch.zeros(0, 3)]}, r"shape=\(0, 3\) .* must not be empty"),
    ],
)
def test_what_it_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorOptimizer([{"params": [torch.zeros(3, 3)], "rule": "muon"} | options])

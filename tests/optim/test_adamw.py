"""The elementwise rule against ``torch.optim.AdamW``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from factorlm.errors import ConfigError
from factorlm.optim import FactorOptimizer

SHAPES = [(5, 7), (9,), (2, 3, 4), ()]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_bit_equal_to_torch(fused: bool) -> None:
    mine = [nn.Parameter(draw(shape, 7)) for shape in SHAPES]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3, "fused": fused}
    ours = FactorOptimizer([{"params": mine, "rule": "adamw"} | options])
    reference = torch.optim.AdamW(theirs, **options)  # type: ignore[arg-type]
    for step in range(4):
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = b.grad = draw(tuple(a.shape), 100 * step + index)
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert ours.state[a].keys() == reference.state[b].keys()
        assert all(
            torch.equal(ours.state[a][key], reference.state[b][key]) for key in ours.state[a]
        )


def test_it_is_fused_where_torch_has_the_kernel() -> None:
    optimizer = FactorOptimizer([nn.Parameter(torch.zeros(2))])
    assert optimizer.param_groups[0]["fused"] is True
    torch.optim.AdamW([nn.Parameter(torch.zeros(2))], fused=True)  # would raise on other devices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) of a group with rule='adamw' must be two"),
        ({"eps": -1e-8}, "eps=-1e-08 of a group with rule='adamw' must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 of a group with rule='adamw' must be"),
        ({"lr": -1.0}, "lr=-1.0 of a group with rule='adamw' must be a number of at least 0"),
        ({"lr": torch.tensor(1.0)}, r"lr=tensor\(1.\) of a group .* must be a number"),
    ],
)
def test_what_it_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorOptimizer([{"params": [torch.zeros(3)], "rule": "adamw"} | options])

"""What a run is at one moment."""

from __future__ import annotations

import pytest
import torch

from factorlm.train.state import seed_step


@pytest.mark.parametrize("seed", [0, -3, 1234567890, 10**30])
def test_any_seed_of_a_recipe_seeds_a_step(seed: int) -> None:
    draws = []
    for place in ((7, 0), (7, 1), (8, 0), (7, 0)):
        seed_step(seed, *place)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[3]
    assert draws[0] not in draws[1:3]


def test_what_pytorch_takes_is_not_changed() -> None:
    seed_step(3, 7, 1)
    found = torch.rand(4)
    torch.manual_seed((3 * 1_000_003 + 7) * 65_537 + 1)
    assert torch.equal(found, torch.rand(4))

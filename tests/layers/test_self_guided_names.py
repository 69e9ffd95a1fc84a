"""A ``SelfGuidedLinear`` in state dicts: its structured layer has the names it has alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from factorlm.layers import BlockShuffleConfig, LowRankConfig, SelfGuidedLinear


def guided(*, nested: bool, seed: int) -> nn.Module:
    """A layer of (4, 6), itself or as the first of two."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = SelfGuidedLinear(LowRankConfig(rank=2).build(4, 6))
        return nn.Sequential(layer, nn.Linear(6, 2)) if nested else layer


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_the_names_are_those_of_the_layer_and_the_guides() -> None:
    plain = list(LowRankConfig(rank=2).build(4, 6).state_dict())
    assert list(guided(nested=False, seed=0).state_dict()) == [*plain, "guide.weight"]
    others = ["1.weight", "1.bias"]
    wanted = [f"0.{name}" for name in (*plain, "guide.weight")] + others
    assert list(guided(nested=True, seed=0).state_dict()) == wanted


def test_the_tensors_are_those_of_the_layer() -> None:
    layer = LowRankConfig(rank=2).build(4, 6)
    tensors = SelfGuidedLinear(layer).state_dict(keep_vars=True)
    assert tensors["V"] is layer.V
    assert tensors["bias"] is layer.bias


@pytest.mark.parametrize("nested", [False, True])
def test_it_loads_what_it_gave(nested: bool) -> None:
    one, other = (guided(nested=nested, seed=seed) for seed in (0, 1))
    other.load_state_dict(one.state_dict())
    assert_same(other.state_dict(), one.state_dict())


def test_a_state_dict_without_a_guide_lacks_the_guide_alone() -> None:
    plain = BlockShuffleConfig(num_blocks=2).build(4, 6)
    layer = SelfGuidedLinear(BlockShuffleConfig(num_blocks=2).build(4, 6))
    tensors = plain.state_dict() | {"extra": torch.ones(1)}
    result = layer.load_state_dict(tensors, strict=False)
    assert result.missing_keys == ["guide.weight"]
    assert result.unexpected_keys == ["structured.extra"]
    assert_same(layer.structured.state_dict(), plain.state_dict())
    assert list(tensors) == [*plain.state_dict(), "extra"], "what is given is not changed"

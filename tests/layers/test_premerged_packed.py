"""Packed matrices of structured layers: M, and factors that are whole matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.layers import (
    STRUCTURES,
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    LowRankConfig,
    MergePolicy,
    PreMergedLinear,
    StructureConfig,
)
from factorlm.ops.packed import can_pack

PACKS = can_pack(torch.zeros(2, 2))
"""Whether float32 is packed here; all that is asked of results holds where it is not."""
CONFIGS = {
    "block_dense": BlockDenseConfig(num_blocks=2, rank=4),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "dense": DenseConfig(),
    "low_rank": LowRankConfig(rank=3),
}
NUM_MATRICES = {"block_dense": 0, "block_shuffle": 0, "dense": 1, "low_rank": 2}
POLICIES = {"factors": MergePolicy.never(), "merged": MergePolicy.always()}


def layer_of(
    config: StructureConfig = CONFIGS["low_rank"],
    policy: MergePolicy = POLICIES["factors"],
    dtype: torch.dtype = torch.float32,
) -> PreMergedLinear:
    """A layer in eval mode with a random bias."""
    torch.manual_seed(0)
    layer = PreMergedLinear(config.build(6, 10, dtype=dtype), policy).eval()
    with torch.no_grad():
        layer.structured.bias.normal_()
    return layer


def inputs(num_tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, 6, generator=torch.Generator().manual_seed(7)).to(dtype)


@torch.no_grad()
def assert_right(found: Tensor, layer: PreMergedLinear, x: Tensor, tolerance: float = 1e-5) -> None:
    """By the map in float64."""
    exact = copy.deepcopy(layer.structured).double()
    wanted = linear(x.double(), exact.to_dense(), exact.bias)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def takes_copy(layer: PreMergedLinear, x: Tensor) -> bool:
    """Whether writes that PyTorch does not count are missed; the copy is there already."""
    factors = [layer.structured.get_parameter(f.name).data for f in layer.structured.factors]
    before = layer(x)
    for factor in factors:
        factor.mul_(2)
    after = layer(x)
    for factor in factors:
        factor.mul_(0.5)
    return torch.equal(before, after)


def copies(layer: PreMergedLinear) -> tuple[bool, bool]:
    """Whether there are one of M and one of the factors."""
    return layer.has_copy, layer._packed.exists


# Which matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_matrices_of_every_structure(name: str) -> None:
    assert CONFIGS.keys() == {n for n in STRUCTURES if not n.startswith("test_")}
    layer = CONFIGS[name].build(6, 10, dtype=torch.float64)
    matrices = layer.matrices()
    assert len(matrices) == NUM_MATRICES[name]
    if matrices:
        *first, product = reversed(matrices)
        for matrix in reversed(first):
            product = matrix @ product
        assert torch.equal(product, layer.to_dense())


# What it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_the_same(name: str, policy: str, mode: Callable) -> None:
    layer = layer_of(CONFIGS[name], POLICIES[policy])
    x = inputs().view(1, 5, 6)
    with mode():
        found, again, wanted = layer(x), layer(x), layer.structured(x)
    merged, whole = policy == "merged", NUM_MATRICES[name] > 0
    assert copies(layer) == (merged, PACKS and whole and not merged)
    # Without packing, M of a dense layer is its own weight.
    assert takes_copy(layer, x) == (any(copies(layer)) and (PACKS or name != "dense"))
    assert torch.equal(found, again)
    assert merged or whole or torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert_right(found, layer, x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 0.04)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float, policy: str) -> None:
    layer = layer_of(policy=POLICIES[policy], dtype=dtype)
    with torch.no_grad():
        found = layer(inputs(dtype=dtype))
    packs = can_pack(layer.structured.V)
    assert packs <= (dtype == torch.bfloat16)
    assert copies(layer) == (policy == "merged", packs and policy == "factors")
    assert_right(found, layer, inputs(dtype=dtype), tolerance)


def test_both_may_be_kept() -> None:
    layer = layer_of(policy=MergePolicy(token_counts=(1, 64), merged=(True, False)))
    with torch.no_grad():
        for count, wanted in ((64, (False, PACKS)), (1, (True, PACKS)), (30, (True, PACKS))):
            assert_right(layer(inputs(count)), layer, inputs(count))
            assert copies(layer) == wanted
    layer.invalidate()
    assert copies(layer) == (False, False)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_bias_and_without_tokens(policy: str) -> None:
    structured = LowRankConfig(rank=3).build(6, 10, bias=False)
    layer = PreMergedLinear(structured, POLICIES[policy]).eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs()), structured(inputs()))
        assert layer(inputs(0).view(2, 0, 6)).shape == (2, 0, 10)


@pytest.mark.parametrize("policy", POLICIES)
def test_derivatives_and_errors_are_those_of_the_factors(policy: str) -> None:
    layer = layer_of(policy=POLICIES[policy])
    with torch.no_grad():
        layer(inputs())
        _, tangent = torch.func.jvp(layer, (inputs(),), (inputs(),))
        torch.testing.assert_close(tangent, linear(inputs(), layer.weight))
        for x in (inputs().double(), inputs()[:, :5], inputs().repeat(1, 2), inputs()[:0, :5]):
            with pytest.raises(RuntimeError) as wanted:
                layer.structured(x)
            with pytest.raises(RuntimeError) as found:
                layer(x)
            assert str(found.value) == str(wanted.value) or not PACKS


@pytest.mark.parametrize(
    "context", [torch.enable_grad, lambda: torch.autocast("cpu", cache_enabled=False)]
)
def test_gradients_and_autocast_take_the_factors(context: Callable) -> None:
    layer = layer_of()
    with torch.no_grad():
        layer(inputs())
        with context():
            assert torch.equal(layer(inputs()), layer.structured(inputs()))
            layer.structured.V.data.mul_(2)
            assert torch.equal(layer(inputs()), layer.structured(inputs()))


# What drops them -----------------------------------------------------------------------------


@torch.no_grad()
def step(layer: PreMergedLinear) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def train(layer: PreMergedLinear) -> None:
    layer.train()
    layer.structured.V.data.mul_(2)
    layer.eval()


def to_dtype(layer: PreMergedLinear) -> None:
    layer.structured.V.data.mul_(2)
    nn.Sequential(layer).to(torch.float64)


def load(layer: PreMergedLinear) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def new_parameter(layer: PreMergedLinear) -> None:
    layer.structured.V = nn.Parameter(2 * layer.structured.V.detach())


AT_ONCE: dict[str, Callable] = {
    "a step": step,
    "train": train,
    "to(dtype)": to_dtype,
    "load_state_dict": load,
}
BY_THE_NEXT_CALL: dict[str, Callable] = {
    "V in place": torch.no_grad()(lambda layer: layer.structured.V.mul_(2)),
    "U in place": torch.inference_mode()(lambda layer: layer.structured.U.mul_(2)),
    "U through a view": lambda layer: layer.structured.U.detach()[1:].zero_(),
    "another V": new_parameter,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [*AT_ONCE, *BY_THE_NEXT_CALL])
def test_a_changed_factor_is_never_missed(name: str, policy: str) -> None:
    layer = layer_of(policy=POLICIES[policy])
    with torch.no_grad():
        before = layer(inputs())
    there = copies(layer)
    assert there == (policy == "merged", PACKS and policy == "factors")
    (AT_ONCE | BY_THE_NEXT_CALL)[name](layer)
    assert copies(layer) == ((False, False) if name in AT_ONCE else there)
    x = inputs(dtype=layer.structured.V.dtype)
    with torch.no_grad():
        after = layer(x)
    assert not torch.allclose(after.float(), before, rtol=0.01)
    assert_right(after, layer, x)


def test_a_duplicate_has_copies_of_its_own() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer(inputs())
        other = copy.deepcopy(layer)
        assert copies(other) == (False, False)
        other.structured.V.mul_(2)
        assert_right(other(inputs()), other, inputs())
        assert_right(layer(inputs()), layer, inputs())

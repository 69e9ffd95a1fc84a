"""A layer with a merged copy: where it takes it, what it computes, what it is to other code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from factorlm.errors import ConfigError
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    LowRankConfig,
    LowRankLinear,
    MergePolicy,
    PreMergedLinear,
    StructureConfig,
)
from factorlm.layers import premerged as premerged_module

STRUCTURES = {
    "low_rank": LowRankConfig(rank=3),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "block_shuffle, no output shuffle": BlockShuffleConfig(num_blocks=2, output_shuffle=False),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=4),
    "dense": DenseConfig(),
}
SIZES = (6, 10)


def premerged(
    config: StructureConfig = STRUCTURES["low_rank"],
    policy: MergePolicy | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int] = SIZES,
) -> PreMergedLinear:
    """A layer in eval mode with a random bias."""
    torch.manual_seed(0)
    layer = PreMergedLinear(config.build(*sizes, dtype=dtype), policy or MergePolicy.always())
    with torch.no_grad():
        layer.structured.bias.normal_()
    return layer.eval()


def inputs(num_tokens: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        num_tokens, SIZES[0], dtype=dtype, generator=torch.Generator().manual_seed(7)
    )


@torch.no_grad()
def truth(layer: PreMergedLinear, x: Tensor) -> Tensor:
    return linear(x, layer.structured.to_dense(), layer.bias)


@torch.no_grad()
def takes_merged(layer: PreMergedLinear, x: Tensor) -> bool:
    """By the FLOPs of a call, which PyTorch counts; the copy is there already."""
    layer(x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    merged = 2 * x.numel() * layer.out_features
    structured = layer.structured
    sizes = (layer.in_features, layer.out_features)
    factors = x.shape[0] * structured.config.flops_per_token(*sizes)
    assert counter.get_total_flops() in (merged, factors)
    return counter.get_total_flops() == merged


# The policy ----------------------------------------------------------------------------------


def test_the_nearest_count_decides_by_ratio() -> None:
    policy = MergePolicy(token_counts=(2, 8, 32), merged=(True, False, True))
    found = [n for n in range(60) if policy.merges(n)]
    assert found == [1, 2, 3, 4, *range(17, 60)]  # sqrt(2 * 8) = 4, sqrt(8 * 32) = 16
    assert policy.ever_merges
    assert str(policy) == "2, 32"


def test_always_and_never() -> None:
    assert [MergePolicy.always().merges(n) for n in (0, 1, 10**6)] == [False, True, True]
    assert not any(MergePolicy.never().merges(n) for n in (0, 1, 10**6))
    assert not MergePolicy.never().ever_merges


def test_refused_policies() -> None:
    with pytest.raises(ConfigError, match=r"token_counts=\(4, 2\) must ascend"):
        MergePolicy(token_counts=(4, 2), merged=(True, True))
    with pytest.raises(ConfigError, match=r"token_counts=\(0,\) must ascend, from 1"):
        MergePolicy(token_counts=(0,), merged=(True,))
    with pytest.raises(ConfigError, match="merged has 1 entries, token_counts 2"):
        MergePolicy(token_counts=(1, 2), merged=(True,))


# What it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.04)],
)
def test_merged_equals_the_factors(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """To rounding in float64; in bf16 both round the values between, each its own."""
    layer = premerged(STRUCTURES[name], dtype=dtype)
    x = inputs(dtype=dtype).view(1, 5, -1)
    with torch.no_grad():
        found, wanted = layer(x), layer.structured(x)
    assert layer.has_copy
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_the_policy_decides_by_the_tokens_of_all_sequences() -> None:
    policy = MergePolicy(token_counts=(1, 2, 4, 8), merged=(True, True, False, False))
    layer = premerged(policy=policy)
    assert [n for n in (1, 2, 3, 4, 8, 50) if takes_merged(layer, inputs(n))] == [1, 2]
    with torch.no_grad():
        layer.invalidate()
        layer(inputs(8).view(2, 4, -1))
        assert not layer.has_copy
        layer(inputs(2).view(2, 1, -1))
        assert layer.has_copy


def test_no_tokens() -> None:
    with torch.no_grad():
        assert premerged()(torch.empty(2, 0, 6, dtype=torch.float64)).shape == (2, 0, 10)


def test_the_copy_is_made_once_and_only_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    to_dense = LowRankLinear.to_dense
    monkeypatch.setattr(LowRankLinear, "to_dense", lambda self: calls.append(0) or to_dense(self))
    layer = premerged()
    layer(inputs())
    assert not calls
    with torch.no_grad():
        for _ in range(3):
            layer(inputs())
    with torch.inference_mode():
        layer(inputs())
    assert len(calls) == 1


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_either_mode_may_make_the_copy_for_the_other(first: Callable) -> None:
    layer = premerged()
    wanted = truth(layer, inputs())
    for mode in (first, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(inputs()), wanted)
    assert takes_merged(layer, inputs())


def test_gradients_in_eval_mode_are_those_of_the_factors() -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
    alone = copy.deepcopy(layer.structured)
    for module in (layer, alone):
        module(inputs()).square().sum().backward()
    for name, parameter in alone.named_parameters():
        assert parameter.grad.abs().max() > 0
        assert torch.equal(layer.structured.get_parameter(name).grad, parameter.grad)


def test_autocast_runs_the_factors() -> None:
    layer = premerged(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(inputs(dtype=torch.float32))
        assert torch.equal(found, layer.structured(inputs(dtype=torch.float32)))
    assert found.dtype == torch.bfloat16
    assert not layer.has_copy


def test_a_cuda_graph_captures_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
        monkeypatch.setattr(premerged_module, "_is_captured", lambda x: True)
        assert not takes_merged(layer, inputs())


@pytest.mark.parametrize("warm", [False, True])
def test_compiled_it_runs_the_factors_in_one_graph(warm: bool) -> None:
    torch._dynamo.reset()
    graphs = []
    layer = premerged()
    x = inputs()
    with torch.no_grad():
        if warm:
            layer(x)
        compiled = torch.compile(
            layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True
        )
        for _ in range(2):
            torch.testing.assert_close(compiled(x), truth(layer, x))
            layer.structured.V.mul_(2)  # a graph that held the copy would now be wrong
    assert len(graphs) == 1


def test_hooks_of_the_structured_layer_are_called() -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
        handle = layer.structured.register_forward_hook(lambda *_: torch.zeros(1))
        assert torch.equal(layer(inputs()), torch.zeros(1))
        handle.remove()
        torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))


def test_factors_that_functional_call_lends() -> None:
    layer = premerged()
    lent = {f"structured.{name}": 2 * p for name, p in layer.structured.named_parameters()}
    with torch.no_grad():
        wanted = 4 * (truth(layer, inputs()) - layer.bias) + 2 * layer.bias
        layer(inputs())
        torch.testing.assert_close(functional_call(layer, lent, (inputs(),)), wanted)
        torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))


def test_inference_tensors_are_not_merged_since_their_changes_do_not_show() -> None:
    with torch.inference_mode():
        layer = premerged()
        for factor in (1, 3):
            layer.structured.V.mul_(factor)
            torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))
    assert not layer.has_copy


# What it is for other code -------------------------------------------------------------------


def test_the_copy_is_no_part_of_the_module() -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
    plain = layer.structured
    assert layer.has_copy
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["V", "U", "bias"]
    assert [id(p) for p in layer.parameters()] == [id(p) for p in plain.parameters()]
    assert list(layer.buffers()) == []
    nested = nn.Sequential(layer, nn.Linear(10, 2))
    assert list(nested.state_dict()) == ["0.V", "0.U", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_duplicates_have_a_copy_of_their_own(duplicate: Callable) -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
        other = duplicate(layer)
        assert not other.has_copy
        assert torch.equal(other(inputs()), layer(inputs()))
        other.structured.V.mul_(2)
        torch.testing.assert_close(other(inputs()), truth(other, inputs()))
        torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))
        other.load_state_dict(layer.state_dict())
        assert not other.has_copy
        assert layer.has_copy
        layer.train()
        assert not layer.has_copy
        torch.testing.assert_close(other(inputs()), truth(other, inputs()))


def test_reads_as_the_structured_layer() -> None:
    layer = premerged()
    assert torch.equal(layer.weight, layer.structured.to_dense())
    assert layer.bias is layer.structured.bias
    assert (layer.in_features, layer.out_features) == SIZES
    dense = layer.to_linear()
    assert torch.equal(dense.weight, layer.weight)
    assert not dense.training
    assert str(layer).startswith("PreMergedLinear(\n  merged at tokens: 1\n")

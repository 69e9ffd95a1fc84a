"""A benchmark refuses what is wrong, on the path and in the form that it would time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.bench import BenchOptions
from factorlm.bench.ffn import benchmark_ffn
from factorlm.bench.kernel import benchmark_kernel
from factorlm.bench.truth import CHECKED_TOKENS, check_layer, check_outputs, naive
from factorlm.errors import NumericError
from factorlm.layers import BlockShuffleConfig, LowRankConfig, SelfGuidedLinear
from factorlm.ops import block_shuffle
from factorlm.ops.block_diagonal import block_diagonal_batched
from factorlm.ops.low_rank import low_rank

SMALL = BenchOptions(shapes=((16, 64),), num_tokens=(8,), dtypes=("fp32",), rounds=2)
GROUPED = SMALL.replace(
    shapes=((512, 2048),), num_tokens=(130,), structures=("block_shuffle",), passes=("forward",)
)
"""More tokens than ``FEW_TOKENS``: the path of training sizes."""
BENCHMARKS = pytest.mark.parametrize("benchmark", [benchmark_kernel, benchmark_ffn])


class Halved(torch.autograd.Function):
    """The identity, with half the gradient."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad / 2


@BENCHMARKS
def test_a_wrong_layer_is_not_timed(
    benchmark: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factorlm.layers.low_rank.low_rank", lambda *args: 1.01 * low_rank(*args))
    with pytest.raises(NumericError, match="output"):
        list(benchmark(SMALL))  # type: ignore[call-overload]


@BENCHMARKS
def test_a_wrong_path_of_many_tokens_is_not_timed(
    benchmark: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong only with gradients, which a forward pass does not have; found nevertheless."""
    right = block_shuffle._Grouped.forward

    def wrong(*args: object) -> Tensor:
        return 1.5 * right(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(block_shuffle._Grouped, "forward", staticmethod(wrong))
    with pytest.raises(NumericError, match=r"output in torch\.float32"):
        list(benchmark(GROUPED))  # type: ignore[call-overload]


@BENCHMARKS
def test_a_path_that_is_wrong_without_gradients_is_not_timed(
    benchmark: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = block_shuffle._multiply_grouped

    def wrong(*args: Tensor) -> Tensor:
        kept = len(args) == 5
        return right(*args) if kept else 1.5 * right(*args)

    monkeypatch.setattr(block_shuffle, "_multiply_grouped", wrong)
    with pytest.raises(NumericError, match="output without gradients"):
        list(benchmark(GROUPED))  # type: ignore[call-overload]


def test_few_tokens_are_checked_without_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "factorlm.ops.block_diagonal.block_diagonal_batched",
        lambda *args: 1.5 * block_diagonal_batched(*args),
    )
    with pytest.raises(NumericError, match=r"output without gradients .* is off by 0\.5"):
        list(benchmark_kernel(SMALL.replace(structures=("block_dense",))))


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LowRankConfig(rank=3).build(5, 7), torch.randn(4, 5)
    check_layer(layer, x)
    monkeypatch.setattr(
        "factorlm.layers.low_rank.low_rank",
        lambda x, *factors: low_rank(Halved.apply(x), *factors),
    )
    with pytest.raises(NumericError, match="gradient of x"):
        check_layer(layer, x)


@pytest.mark.parametrize("token", [0, -1])
def test_the_first_and_the_last_of_many_tokens_are_compared(token: int) -> None:
    layer, x = LowRankConfig(rank=3).build(5, 7), torch.randn(3 * CHECKED_TOKENS + 1, 5)

    def run(x: Tensor) -> Tensor:
        y = layer(x).clone()
        y[token] += 100
        return y

    check_layer(layer, x)
    with pytest.raises(NumericError, match="output"):
        check_layer(layer, x, run)
    with pytest.raises(NumericError, match="output"):
        check_outputs(run, layer, x)
    check_outputs(layer, layer, x)


def test_nan_is_wrong() -> None:
    layer = nn.Linear(5, 7)
    with pytest.raises(NumericError, match="off by nan"):
        check_layer(layer, torch.full((2, 5), torch.nan))


def test_the_truth_takes_no_path_of_the_ops() -> None:
    layer = BlockShuffleConfig(num_blocks=2).build(8, 12)
    model, x = nn.Sequential(nn.GELU(), layer), torch.randn(3, 8)
    wanted = linear(nn.functional.gelu(x.double()), layer.to_dense().double(), layer.bias.double())
    found = naive(model)(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert type(layer).forward is layer.forward.__func__  # the layer itself is left as it was


def test_a_guided_layer_is_held_against_both_maps() -> None:
    layer, x = SelfGuidedLinear(LowRankConfig(rank=3).build(5, 7), form="merged"), torch.randn(4, 5)
    layer.set_alpha(0.5)
    check_layer(layer, x)
    with torch.no_grad():
        layer.guide.weight += 1.0
    check_layer(layer, x)
    with pytest.raises(NumericError, match="output"):
        check_layer(layer, x, layer.structured)

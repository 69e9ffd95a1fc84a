"""Each fast path against its naive truth, forward and backward, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from factorlm.ops.block_dense import block_dense, block_dense_dense
from factorlm.ops.block_diagonal import (
    FEW_TOKENS,
    block_diagonal,
    block_diagonal_batched,
)
from factorlm.ops.block_shuffle import block_shuffle, block_shuffle_dense, num_rounds
from factorlm.ops.low_rank import low_rank, low_rank_dense
from factorlm.ops.reference import (
    block_dense_reference,
    block_shuffle_reference,
    low_rank_reference,
)

small = st.integers(1, 6)
fast = settings(max_examples=40, deadline=None)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients in every input that is used."""
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).view(actual.shape)
    actual_grads = torch.autograd.grad(actual, inputs, cotangent)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent)
    for got, want in zip(actual_grads, expected_grads, strict=True):
        assert_close(got, want, rtol=1e-11, atol=1e-11)


@fast
@given(tokens=small, in_features=small, out_features=small, rank=small)
def test_low_rank(tokens: int, in_features: int, out_features: int, rank: int) -> None:
    x, V, U, bias = leaves(
        (tokens, in_features), (rank, in_features), (out_features, rank), (out_features,)
    )
    truth = low_rank_reference(V, U)
    assert_same(low_rank(x, V, U, bias), x @ truth.T + bias, [x, V, U, bias])
    assert_same(low_rank_dense(V, U), low_rank_reference(V, U), [V, U])


@fast
@given(tokens=small, blocks=small, block_in=small, block_rank=small, out_features=small)
def test_block_dense(
    tokens: int, blocks: int, block_in: int, block_rank: int, out_features: int
) -> None:
    x, B, L, bias = leaves(
        (tokens, blocks * block_in),
        (blocks, block_rank, block_in),
        (out_features, blocks * block_rank),
        (out_features,),
    )
    truth = block_dense_reference(B, L)
    assert_same(block_dense(x, B, L, bias), x @ truth.T + bias, [x, B, L, bias])
    assert_same(block_dense_dense(B, L), block_dense_reference(B, L), [B, L])


@pytest.mark.parametrize("few_tokens", [0, FEW_TOKENS])
@pytest.mark.parametrize("output_shuffle", [True, False])
@fast
@given(tokens=small, blocks=small, block_in=small, block_hidden=small, block_out=small)
def test_block_shuffle(
    output_shuffle: bool,
    few_tokens: int,
    tokens: int,
    blocks: int,
    block_in: int,
    block_hidden: int,
    block_out: int,
) -> None:
    x, first, second, bias = leaves(
        (tokens, blocks * block_in),
        (blocks, block_hidden, block_in),
        (blocks, block_out, block_hidden),
        (blocks * block_out,),
    )
    inputs, shuffle = [x, first, second, bias], {"output_shuffle": output_shuffle}
    truth = block_shuffle_reference(first, second, **shuffle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factorlm.ops.block_shuffle.FEW_TOKENS", few_tokens)
        y = block_shuffle(x, first, second, bias, **shuffle)
    assert_same(y, x @ truth.T + bias, inputs)
    truth = block_shuffle_reference(first, second, **shuffle)
    assert_same(block_shuffle_dense(first, second, **shuffle), truth, [first, second])


def test_block_shuffle_follows_one_value_through_the_papers_formula() -> None:
    """I = 6, m = 6, O = 12, G = 3: input 5 is in block 2; its second hidden value is j = 5, group
    5 mod 3 = 2, slot 5 div 3 = 1; output slot 3 of group 2 lands at 3 * 3 + 2 = 11."""
    first, second = torch.zeros(3, 2, 2), torch.zeros(3, 4, 2)
    first[2, 1, 1] = 2.0
    second[2, 3, 1] = 5.0
    y = block_shuffle(torch.eye(6)[5], first, second)
    assert y.nonzero().flatten().tolist() == [11]
    assert y[11] == 10.0
    y = block_shuffle(torch.eye(6)[5], first, second, output_shuffle=False)
    assert y.nonzero().flatten().tolist() == [2 * 4 + 3]


def test_one_block_is_low_rank() -> None:
    x, V, U, bias = leaves((4, 6), (3, 6), (5, 3), (5,))
    expected = low_rank(x, V, U, bias)
    assert_close(block_shuffle(x, V[None], U[None], bias), expected)
    assert_close(block_dense(x, V[None], U, bias), expected)


@pytest.mark.parametrize("form", [block_diagonal, block_diagonal_batched])
@pytest.mark.parametrize("with_bias", [True, False])
def test_block_diagonal_is_the_product_with_the_block_diagonal_matrix(
    form: Callable[..., Tensor], with_bias: bool
) -> None:
    x, blocks, bias = leaves((5, 6), (3, 4, 2), (12,))
    expected = x @ torch.block_diag(*blocks).T
    if with_bias:
        assert_same(form(x, blocks, bias), expected + bias, [x, blocks, bias])
    else:
        assert_same(form(x, blocks), expected, [x, blocks])


@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("with_bias", [True, False])
def test_block_diagonal_without_gradients_is_the_same(num_tokens: int, with_bias: bool) -> None:
    x, blocks, bias = leaves((num_tokens, 6), (3, 4, 2), (12,))
    inputs = (x, blocks, bias if with_bias else None)
    with torch.no_grad():
        found = block_diagonal(*inputs)
    assert not found.requires_grad
    assert found.is_contiguous()
    assert_close(found, block_diagonal(*inputs).detach(), rtol=1e-13, atol=1e-13)


def test_block_diagonal_computes_only_the_gradients_that_are_asked_for() -> None:
    x, blocks, bias = leaves((5, 6), (3, 4, 2), (12,))
    for wanted in (x, blocks, bias):
        inputs = [t if t is wanted else t.detach() for t in (x, blocks, bias)]
        (expected,) = torch.autograd.grad(block_diagonal(x, blocks, bias).sum(), [wanted])
        with FlopCounterMode(display=False) as counter:
            (found,) = torch.autograd.grad(block_diagonal(*inputs).sum(), [wanted])
        assert torch.equal(found, expected)
        products = 1 if wanted is bias else 2
        assert counter.get_total_flops() == products * 2 * 5 * blocks.numel()


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_ops_under_autocast_are_near_the_truth(dtype: torch.dtype, num_tokens: int) -> None:
    x, first, second, bias = (t.detach().float().requires_grad_() for t in
                              leaves((num_tokens, 16), (2, 8, 8), (2, 12, 8), (24,)))  # fmt: skip
    exact = block_shuffle(*(t.double() for t in (x, first, second, bias)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = block_shuffle(x, first, second, bias)
    assert y.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.linalg.norm(y - exact) < tolerance * torch.linalg.norm(exact)
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, first, second))


@pytest.mark.parametrize("block_hidden", [7, 8])
def test_every_order_of_the_shuffle_agrees(block_hidden: int) -> None:
    """Hidden values lie by feature beyond a few tokens. Up to there they are put in the order of
    the groups, or from I/G tokens on, where G² divides m, the rows of the first factor are."""
    x, *factors = leaves((2 * FEW_TOKENS, 16), (2, block_hidden, 8), (2, 12, block_hidden))
    many = block_shuffle(x, *factors)
    for num_tokens in (FEW_TOKENS, 1):
        few = torch.cat([block_shuffle(rows, *factors) for rows in x.split(num_tokens)])
        assert_same(many, few, [x, *factors])
        many = block_shuffle(x, *factors)


@pytest.mark.parametrize("num_tokens", [0, 1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("with_bias", [True, False])
def test_block_shuffle_without_gradients_is_the_same(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, with_bias: bool
) -> None:
    monkeypatch.setattr("factorlm.ops.block_shuffle.TOKENS_AT_ONCE", 30)
    x, first, second, bias = leaves((num_tokens, 6), (3, 4, 2), (3, 5, 4), (15,))
    inputs = (x, first, second, bias if with_bias else None)
    with torch.no_grad():
        found = block_shuffle(*inputs)
    assert not found.requires_grad
    assert_close(found, block_shuffle(*inputs).detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("few_tokens", [0, FEW_TOKENS])
def test_block_shuffle_computes_only_the_gradients_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, few_tokens: int
) -> None:
    monkeypatch.setattr("factorlm.ops.block_shuffle.FEW_TOKENS", few_tokens)
    x, first, second, bias = inputs = leaves((10, 16), (2, 8, 8), (2, 12, 8), (24,))
    products = {x: (first, second, second, first), first: (first, second, second, first),
                second: (first, second, second), bias: (first, second)}  # fmt: skip
    for wanted, factors in products.items():
        chosen = [t if t is wanted else t.detach() for t in inputs]
        with FlopCounterMode(display=False) as counter:
            (alone,) = torch.autograd.grad(block_shuffle(*chosen).square().sum(), [wanted])
        (beside,) = torch.autograd.grad(block_shuffle(*inputs).square().sum(), [wanted])
        assert torch.equal(alone, beside)
        assert counter.get_total_flops() == sum(2 * 10 * factor.numel() for factor in factors)


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS, FEW_TOKENS + 1])
def test_block_shuffle_refuses_to_be_differentiated_again(num_tokens: int) -> None:
    x, first, second = leaves((num_tokens, 6), (3, 4, 2), (3, 5, 4))
    y = block_shuffle(x, first, second)
    (slope,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@given(blocks=st.integers(1, 12), block_hidden=st.integers(1, 40))
def test_num_rounds_counts_the_rounds_that_a_block_touches(blocks: int, block_hidden: int) -> None:
    touched = []
    for p in range(blocks):
        values = range(p * block_hidden, (p + 1) * block_hidden)
        touched.append(len({j // blocks for j in values}))
    assert num_rounds(blocks, block_hidden) == max(touched)

"""What block products run on an accelerator, and what ops keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from factorlm.ops import block_diagonal, block_shuffle
from factorlm.ops.block_dense import block_dense
from factorlm.ops.block_diagonal import FEW_TOKENS
from factorlm.ops.low_rank import low_rank

N, IN, OUT, RANK, BLOCKS = 40, 32, 64, 8, 2


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operands(num_blocks: int = 3) -> tuple[Tensor, ...]:
    """x (5, 6), blocks (G, 4, 6/G), bias (4 G,), the gradient of the output (5, 4 G)."""
    shapes = ((5, 6), (num_blocks, 4, 6 // num_blocks), (4 * num_blocks,), (5, 4 * num_blocks))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_one_batched_product_writes_into_the_panels(num_blocks: int, with_bias: bool) -> None:
    x, blocks, bias, _ = operands(num_blocks)
    wanted = x @ torch.block_diag(*blocks).T + (bias if with_bias else 0)
    wide = torch.full((5, 4 * num_blocks + 2), torch.nan, dtype=torch.float64)
    y = wide[:, 1:-1]
    given = bias if with_bias else None
    rows, out = (block_diagonal.panels(whole, num_blocks) for whole in (x, y))
    assert block_diagonal.multiply_at_once(rows, blocks.transpose(1, 2), out, given) is out
    assert_close(y, wanted)
    assert wide[:, [0, -1]].isnan().all()
    assert_close(block_diagonal.multiply_panels(x, blocks.transpose(1, 2), given), wanted)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_one_batched_product_gives_the_gradients_of_blocks(num_blocks: int) -> None:
    x, blocks, _, slope = operands(num_blocks)
    wanted = [
        grad.T @ part
        for grad, part in zip(slope.chunk(num_blocks, 1), x.chunk(num_blocks, 1), strict=True)
    ]
    found = torch.full_like(blocks, torch.nan)
    grads, rows = (block_diagonal.panels(whole, num_blocks) for whole in (slope, x))
    block_diagonal.multiply_at_once(grads.mT, rows, found)
    assert_close(found, torch.stack(wanted))
    assert_close(block_diagonal.block_gradients(slope, x, blocks), found)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [FEW_TOKENS + 1, 2 * FEW_TOKENS])
def test_block_shuffle_at_once_is_block_shuffle_in_turn(
    num_tokens: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an accelerator computes it: values, with and without gradients, and gradients."""
    inputs = [leaf(num_tokens, IN), leaf(BLOCKS, RANK, IN // BLOCKS), leaf(BLOCKS, OUT, RANK)]
    inputs += [leaf(BLOCKS * OUT)] * with_bias

    def everything() -> list[Tensor]:
        y = block_shuffle.block_shuffle(*inputs)
        with torch.no_grad():
            alone = block_shuffle.block_shuffle(*inputs)
        return [y, alone, *torch.autograd.grad(y.square().sum(), inputs)]

    wanted = everything()
    calls: list[Tensor] = []

    def at_once(*operands: Tensor) -> Tensor:
        calls.append(operands[2])
        return block_diagonal.multiply_at_once(*operands)

    monkeypatch.setattr(block_shuffle, "multiply_each", at_once)
    assert_close(everything(), wanted)
    assert len(calls) == 8


def saved_by(op, *leaves: Tensor, **options: bool) -> list[int]:  # type: ignore[no-untyped-def]
    """Sizes of the different tensors that ``op`` keeps for its backward pass, in values."""
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = op(*leaves, **options)
        assert y.requires_grad
    return sorted(sizes.values())


def test_low_rank_keeps_its_input_and_r_values_a_token() -> None:
    x, V, U = leaf(N, IN), leaf(RANK, IN), leaf(OUT, RANK)
    wanted = sorted([x.numel(), V.numel(), U.numel(), N * RANK])
    assert saved_by(low_rank, x, V, U, leaf(OUT)) == wanted


def test_block_dense_keeps_its_input_and_r_values_a_token() -> None:
    x, B, L = leaf(N, IN), leaf(BLOCKS, RANK // BLOCKS, IN // BLOCKS), leaf(OUT, RANK)
    wanted = sorted([x.numel(), B.numel(), L.numel(), N * RANK])
    assert saved_by(block_dense, x, B, L, leaf(OUT)) == wanted


@pytest.mark.parametrize("output_shuffle", [True, False])
@pytest.mark.parametrize("num_tokens", [IN // BLOCKS - 1, IN // BLOCKS, N, FEW_TOKENS + 1])
def test_block_shuffle_keeps_its_input_and_m_values_a_token(
    num_tokens: int, output_shuffle: bool
) -> None:
    x, first = leaf(num_tokens, IN), leaf(BLOCKS, IN // BLOCKS, IN // BLOCKS)
    second = leaf(BLOCKS, OUT // BLOCKS, IN // BLOCKS)
    wanted = sorted([x.numel(), first.numel(), second.numel(), num_tokens * IN])
    found = saved_by(
        block_shuffle.block_shuffle, x, first, second, leaf(OUT), output_shuffle=output_shuffle
    )
    assert found == wanted


def test_block_shuffle_without_gradients_keeps_the_values_of_some_tokens_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_shuffle, "FEW_TOKENS", 0)
    monkeypatch.setattr(block_shuffle, "TOKENS_AT_ONCE", 16)
    x, first = leaf(N, IN), leaf(BLOCKS, IN // BLOCKS, IN // BLOCKS)
    second, bias = leaf(BLOCKS, OUT // BLOCKS, IN // BLOCKS), leaf(OUT)
    held = []
    right = block_shuffle._groups

    def spied(hidden: Tensor, second: Tensor) -> Tensor:
        held.append((hidden.untyped_storage().nbytes() // 8, hidden.numel()))
        return right(hidden, second)

    monkeypatch.setattr(block_shuffle, "_groups", spied)
    wanted = block_shuffle.block_shuffle(x, first, second, bias)
    assert held == [(N * IN, N * IN)]
    held.clear()
    with torch.no_grad():
        found = block_shuffle.block_shuffle(x, first, second, bias)
    assert held == [(16 * IN, 16 * IN)] * 2 + [(16 * IN, 8 * IN)]
    assert not found.requires_grad
    assert_close(found, wanted.detach(), rtol=1e-13, atol=1e-13)

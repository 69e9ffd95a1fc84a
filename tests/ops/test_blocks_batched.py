"""What block products run on an accelerator, and what ops keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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


class OnGPU(Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


class Operators(TorchDispatchMode):
    """Notes what runs, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def lies_as_bmm_takes_it(blocks: Tensor) -> bool:
    """The rule of PyTorch's batched product on CUDA (``ATen/native/cuda/Blas.cpp``) for its
    operands and its result; it copies others."""
    rows, columns = blocks.shape[1:]
    row_step, column_step = blocks.stride()[1:]
    by_rows = column_step == 1 and row_step >= max(1, columns)
    by_columns = row_step == 1 and column_step >= max(1, rows)
    return by_rows or by_columns


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("sizes", [(32, 64, 2), (64, 32, 4), (60, 36, 3), (6, 6, 1)], ids=str)
def test_on_a_gpu_block_shuffle_is_two_products_that_copy_nothing(
    sizes: tuple[int, int, int], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    width_in, width_out, blocks = sizes
    hidden = min(width_in, width_out) // blocks
    first, second = (
        leaf(blocks, hidden, width_in // blocks),
        leaf(blocks, width_out // blocks, hidden),
    )
    x = leaf(num_tokens, width_in)
    operands: list[Tensor] = []

    def noted(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        operands.extend((left, right, out))
        return block_diagonal.multiply_at_once(left, right, out, bias)

    monkeypatch.setattr(block_shuffle, "multiply_each", noted)
    with Operators() as operators:
        found = block_shuffle.block_shuffle(
            x.as_subclass(OnGPU), first, second, output_shuffle=False
        )
    ran = [name for name in operators.names if "empty" not in name]
    assert ran == ["aten.bmm.out"] * 2
    assert all(map(lies_as_bmm_takes_it, operands))
    wanted = x @ block_shuffle.block_shuffle_dense(first, second, output_shuffle=False).T
    assert_close(found.as_subclass(Tensor), wanted)


@torch.no_grad()
def test_on_a_gpu_no_tokens_are_none() -> None:
    x, first, second = leaf(0, 6), leaf(2, 3, 3), leaf(2, 4, 3)
    assert block_shuffle.block_shuffle(x.as_subclass(OnGPU), first, second).shape == (0, 8)


def test_the_rule_of_the_batched_product() -> None:
    blocks = torch.zeros(2, 3, 4)
    assert lies_as_bmm_takes_it(blocks)
    assert lies_as_bmm_takes_it(blocks.mT)
    assert not lies_as_bmm_takes_it(torch.zeros(2, 3, 8)[:, :, ::2])


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

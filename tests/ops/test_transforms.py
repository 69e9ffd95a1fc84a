"""Block ops where PyTorch follows their operators: transforms, export; and dtypes that differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from factorlm.ops.block_dense import block_dense, block_dense_dense
from factorlm.ops.block_diagonal import FEW_TOKENS
from factorlm.ops.block_shuffle import block_shuffle, block_shuffle_dense

Factors = tuple[Tensor, Tensor, Tensor]
SHAPES = {block_shuffle: ((2, 4, 8), (2, 3, 4)), block_dense: ((2, 4, 8), (6, 8))}
TO_DENSE = {block_shuffle: block_shuffle_dense, block_dense: block_dense_dense}

each_op = pytest.mark.parametrize("op", list(SHAPES), ids=lambda op: op.__name__)
few_and_many = pytest.mark.parametrize("num_tokens", [FEW_TOKENS, FEW_TOKENS + 1])


def draw(op: Callable[..., Tensor], num_tokens: int) -> tuple[Tensor, Factors]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_tokens, 16), *SHAPES[op], (6,))
    x, first, second, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, (first, second, bias)


def dense(op: Callable[..., Tensor], x: Tensor, factors: Factors) -> Tensor:
    first, second, bias = factors
    return nn.functional.linear(x, TO_DENSE[op](first, second), bias)


@each_op
@few_and_many
def test_gradients_of_each_sample(op: Callable[..., Tensor], num_tokens: int) -> None:
    x, factors = draw(op, 3 * num_tokens)
    samples = x.view(3, num_tokens, 16)

    def per_sample(run: Callable[..., Tensor]) -> Factors:
        def loss(factors: Factors, sample: Tensor) -> Tensor:
            return run(sample, factors).square().sum()

        found: Factors = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, samples)
        return found

    found = per_sample(lambda x, factors: op(x, *factors))
    for got, want in zip(found, per_sample(partial(dense, op)), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-4)


@each_op
@few_and_many
def test_forward_mode_and_second_derivatives(op: Callable[..., Tensor], num_tokens: int) -> None:
    x, factors = draw(op, num_tokens)
    x, factors = x.double(), [factor.double() for factor in factors]
    for run in (torch.func.jvp, _hessian_times):
        found = run(lambda x: op(x, *factors), (x,), (x.flip(0),))[1]
        want = run(lambda x: dense(op, x, factors), (x,), (x.flip(0),))[1]
        assert_close(found, want, rtol=1e-10, atol=1e-10)


def _hessian_times(
    run: Callable[[Tensor], Tensor], at: tuple[Tensor], direction: tuple[Tensor]
) -> tuple[Tensor, Tensor]:
    gradient = torch.func.grad(lambda x: run(x).pow(3).sum())
    found: tuple[Tensor, Tensor] = torch.func.jvp(gradient, at, direction)
    return found


@each_op
@few_and_many
@pytest.mark.parametrize("grad", [True, False])
def test_an_input_of_another_dtype_is_refused(
    op: Callable[..., Tensor], num_tokens: int, grad: bool
) -> None:
    x, factors = draw(op, num_tokens)
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            op(x.to(dtype), *factors)


@each_op
def test_an_exported_program_takes_any_number_of_tokens(op: Callable[..., Tensor]) -> None:
    x, factors = draw(op, 2 * FEW_TOKENS)
    module = _Op(op, factors)
    sizes = ({0: torch.export.Dim("num_tokens", min=2, max=1000)},)
    exported = torch.export.export(module, (x[:4],), dynamic_shapes=sizes).module()
    for num_tokens in (3, 17, 2 * FEW_TOKENS):
        part = x[:num_tokens]
        assert_close(exported(part), dense(op, part, factors), rtol=1e-4, atol=1e-4)


class _Op(nn.Module):
    def __init__(self, op: Callable[..., Tensor], factors: Factors) -> None:
        super().__init__()
        self.op = op
        self.factors = nn.ParameterList(factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.factors)

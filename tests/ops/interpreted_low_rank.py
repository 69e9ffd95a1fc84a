"""The Triton kernel of low_rank in Triton's interpreter, against float64.

Run by ``test_triton_low_rank.py`` in a process of its own: Triton reads ``TRITON_INTERPRET`` when
it is imported, and nobody else's kernels are to be interpreted.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton.language as tl  # noqa: F401 - the interpreter looks for it beside a kernel
from torch import Tensor, nn
from torch.nn.functional import linear
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from factorlm.ops import low_rank as module
from factorlm.ops import triton_low_rank as kernel
from factorlm.ops.low_rank import low_rank

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 6e-4}
"""Relative, in norm: h and y are each rounded once, to 24, 8 or 11 bits. In bfloat16 the
interpreter cuts off where a GPU rounds."""
SIZES = [
    (300, 37, 70),  # nothing is a multiple of a tile
    (1100, 20, 33),  # as many parts as there may be
    (64, 32, 96),  # one part
    (1, 1, 1),
    (160, 300, 17),  # more columns of U than a program holds at once
]


def operands(
    num_tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, V, U, bias, of which each product has values around 1."""
    width_in, rank, width_out = sizes
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, width_in, generator=draw)
    V = torch.randn(rank, width_in, generator=draw) / width_in**0.5
    U = torch.randn(width_out, rank, generator=draw) / rank**0.5
    bias = torch.randn(width_out, generator=draw)
    return x.to(dtype), V.to(dtype), U.to(dtype), bias.to(dtype)


def assert_near(found: Tensor, x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None) -> None:
    """To the exact product of the same operands, as a whole and every value of it."""
    assert found.dtype == x.dtype
    truth = x.double() @ V.double().T @ U.double().T
    if bias is not None:
        truth += bias.double()
    error = found.double() - truth
    tolerance = TOLERANCES[x.dtype]
    assert torch.linalg.norm(error) <= tolerance * torch.linalg.norm(truth)
    assert error.abs().max() <= 3 * tolerance * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_product(num_tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, V, U, bias = operands(num_tokens, sizes, dtype)
    assert_near(kernel.fused_low_rank(x, V, U, bias), x, V, U, bias)
    assert_near(kernel.fused_low_rank(x, V, U), x, V, U, None)


def test_the_sizes_divide_the_work_in_every_way() -> None:
    chosen = [
        kernel.tiles_of(*operands(num_tokens, sizes, torch.float32)[:3])
        for num_tokens, sizes in itertools.product((1, 64), SIZES)
    ]
    assert {tiles.num_parts for tiles in chosen} >= {1, 2, 8}
    assert any(tiles.block_k < rank for tiles, (_, rank, _) in zip(chosen, SIZES * 2, strict=True))


def test_what_the_tolerance_catches() -> None:
    """One value of h that is missing, and float16 in the place of float32."""
    x, V, U, _ = operands(3, (300, 37, 70), torch.float32)
    without_one = V.clone()
    without_one[5] = 0
    for wrong in (linear(linear(x, without_one), U), linear(linear(x.half(), V.half()), U.half())):
        with pytest.raises(AssertionError):
            assert_near(wrong.float(), x, V, U, None)


def test_calls_leave_the_counters_at_zero_and_repeat_their_bits() -> None:
    inputs = {sizes: operands(5, sizes, torch.bfloat16) for sizes in SIZES}
    first = {sizes: kernel.fused_low_rank(*inputs[sizes]) for sizes in SIZES}
    counters = kernel._counters(torch.device("cpu"))
    for sizes in (*SIZES, *reversed(SIZES)):
        assert torch.equal(kernel.fused_low_rank(*inputs[sizes]), first[sizes])
        assert counters.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_programs_that_run_at_once_and_start_in_any_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads, where those of the second product do wait for the first."""
    x, V, U, bias = operands(5, (1100, 20, 33), torch.float32)
    expected = kernel.fused_low_rank(x, V, U, bias)
    program = kernel._kernel.rewrite()
    programs: list[dict[str, Any]] = []

    @functools.wraps(program)
    def later(**arguments: Any) -> None:
        programs.append(arguments)
        if len(programs) == interpreter_builder.grid_dim[0]:
            random.Random(seed).shuffle(programs)
            with ThreadPoolExecutor(len(programs)) as pool:
                for done in [pool.submit(program, **one) for one in programs]:
                    done.result()

    later.__signature__ = inspect.signature(program)  # type: ignore[attr-defined]
    monkeypatch.setitem(InterpretedFunction.rewritten_fn, kernel._kernel.fn, later)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert torch.equal(kernel.fused_low_rank(x, V, U, bias), expected)
    finally:
        sys.setswitchinterval(interval)
    assert len(programs) > 8
    assert kernel._counters(x.device).tolist() == [0, 0, 0, 0]


def test_counters_that_were_taken_are_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "NUM_COUNTERS", 3)
    counters = kernel._Counters(torch.device("cpu"))
    taken = [counters.take(), counters.of_stream(7), counters.take()]
    addresses = [one.data_ptr() for one in taken if one is not None]
    assert len(set(addresses)) == 3
    assert all(address % 16 == 0 for address in addresses)
    assert counters.take() is None
    assert counters.of_stream(8) is None
    assert counters.of_stream(7) is taken[1]


def test_not_a_number_stays_in_its_row() -> None:
    x, V, U, bias = operands(4, (300, 37, 70), torch.float32)
    expected = kernel.fused_low_rank(x, V, U, bias)
    x[2, 7] = torch.nan
    found = kernel.fused_low_rank(x, V, U, bias)
    assert found[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(found[others], expected[others])


def test_the_op_takes_the_kernel_and_compares_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_kernel", lambda x: True)
    monkeypatch.setattr(module, "_AGREES", {})
    compare, compared = module._near, []
    monkeypatch.setattr(module, "_near", lambda *args: compared.append(1) or compare(*args))
    x, V, U, bias = operands(6, (300, 37, 70), torch.bfloat16)
    V, U, bias = nn.Parameter(V), nn.Parameter(U), nn.Parameter(bias)
    with torch.no_grad():
        one_launch = kernel.fused_low_rank(x, V, U, bias)
        assert not torch.equal(one_launch, linear(linear(x, V), U, bias))
        assert torch.equal(low_rank(x, V, U, bias), one_launch)
        assert torch.equal(low_rank(x.view(2, 1, 3, 300), V, U, bias), one_launch.view(2, 1, 3, 70))
        assert torch.equal(low_rank(x[:5], V, U, bias), one_launch[:5])  # as many tiles as for 6
        assert compared == [1]
        low_rank(x, V, U)
        assert compared == [1, 1]
    assert set(module._AGREES.values()) == {True}

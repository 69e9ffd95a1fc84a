"""The Triton kernel of low_rank in Triton's interpreter, against float64.

Run by ``test_interpreted.py`` in a process of its own: Triton reads ``TRITON_INTERPRET`` when
it is imported, and nobody else's kernels are to be interpreted.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton.language as tl  # noqa: F401 - the interpreter looks for it beside a kernel
from torch import Tensor, nn
from torch.nn.functional import linear
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from factorlm.ops import low_rank as module
from factorlm.ops import triton_low_rank as kernel
from factorlm.ops.low_rank import low_rank

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 6e-4}
"""Relative, in norm: h and y are each rounded once, to 24, 8 or 11 bits. In bfloat16 the
interpreter cuts off where a GPU rounds."""
SIZES = [
    (300, 37, 70),  # nothing is a multiple of a block
    (3900, 20, 33),  # as many parts as there may be
    (64, 32, 96),  # one part
    (1, 1, 1),
    (600, 1000, 17),  # more blocks of h than counters, more columns of U than a program holds
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
@pytest.mark.parametrize("num_tokens", [1, 3, 15, 16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_product(num_tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, V, U, bias = operands(num_tokens, sizes, dtype)
    assert_near(kernel.fused_low_rank(x, V, U, bias), x, V, U, bias)
    assert_near(kernel.fused_low_rank(x, V, U), x, V, U, None)


def test_the_sizes_divide_the_work_in_every_way() -> None:
    chosen = {kernel.num_parts_of(*operands(1, sizes, torch.float32)[:2]) for sizes in SIZES}
    assert chosen >= {1, 2, 8}
    columns = kernel.BLOCK_BYTES // 4
    assert any(rank > columns for _, rank, _ in SIZES)


@pytest.mark.parametrize(("rank", "num_parts", "num_counters"), [(992, 2, 64), (993, 1, 2)])
def test_ranks_about_the_one_that_takes_all_counters(
    rank: int, num_parts: int, num_counters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch leaves what lies behind its counters alone."""
    monkeypatch.setattr(kernel, "_num_processors", lambda device: 1000)
    rows = torch.zeros(2, kernel.COUNTERS_OF_A_LAUNCH, dtype=torch.int32)
    monkeypatch.setattr(kernel, "_counters", lambda device: rows[0])
    used = set()
    add = interpreter_builder.create_atomic_rmw

    def noted(operation: Any, pointer: Any, *rest: Any) -> Any:
        used.add((int(pointer.data[0]) - rows.data_ptr()) // 4)
        return add(operation, pointer, *rest)

    monkeypatch.setattr(interpreter_builder, "create_atomic_rmw", noted)
    x, V, U, bias = operands(2, (300, rank, 17), torch.float32)
    assert kernel.num_parts_of(x, V) == num_parts
    assert_near(kernel.fused_low_rank(x, V, U, bias), x, V, U, bias)
    assert used == set(range(num_counters))
    assert not rows.any()


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
    assert counters is not None
    for sizes in (*SIZES, *reversed(SIZES)):
        assert torch.equal(kernel.fused_low_rank(*inputs[sizes]), first[sizes])
        assert not counters.any()


@pytest.mark.parametrize("seed", range(5))
def test_programs_that_run_at_once_and_start_and_end_in_any_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads, where those of the second product do wait for the first, and any part of a block
    of h may be its last."""
    x, V, U, bias = operands(5, (2000, 40, 33), torch.float32)
    expected = kernel.fused_low_rank(x, V, U, bias)
    num_blocks, num_parts = 3, 8
    num_stored = stored_in_order(random.Random(seed).sample(range(8), 8), num_blocks, monkeypatch)
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
    assert len(programs) == num_blocks * num_parts + 2
    assert num_stored == dict.fromkeys(range(num_blocks), num_parts)
    counters = kernel._counters(x.device)
    assert counters is not None
    assert not counters.any()


def stored_in_order(
    parts: list[int], num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> Counter[int]:
    """Has programs of the first product wait for one another, so that the parts of each block of h
    are counted in this order; returns how many of a block were."""
    num_stored: Counter[int] = Counter()
    changed = threading.Condition()
    program = threading.local()
    add = interpreter_builder.create_atomic_rmw

    def counted(operation: Any, pointer: Any, *rest: Any) -> Any:
        found = add(operation, pointer, *rest)
        if not hasattr(program, "number"):  # the first counter gives it its number
            program.first, program.number = int(pointer.data[0]), int(found.data[0])
        counter = (int(pointer.data[0]) - program.first) // 4
        if counter >= 2:
            with changed:
                num_stored[counter - 2] += 1
                changed.notify_all()
        return found

    def in_turn() -> None:
        block, part = divmod(program.number, len(parts))
        if block < num_blocks:
            turn = parts.index(part)
            with changed:
                assert changed.wait_for(lambda: num_stored[block] >= turn, timeout=60)

    monkeypatch.setattr(interpreter_builder, "create_atomic_rmw", counted)
    monkeypatch.setattr(interpreter_builder, "create_barrier", in_turn)
    return num_stored


def test_a_launch_that_finds_no_counters_is_not_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not wait for the one that zeroes new ones. The interpreter knows no chained form."""
    x, V, U, bias = operands(2, (300, 37, 70), torch.float32)
    expected = kernel.fused_low_rank(x, V, U, bias)
    broken = torch.zeros(kernel.COUNTERS_OF_A_LAUNCH, dtype=torch.int32)
    monkeypatch.setattr(kernel, "_counters", lambda device: broken)
    with pytest.raises(InterpreterError):  # which leaves them as they are
        kernel.fused_low_rank(x, V, U, bias, chained=True)
    monkeypatch.setattr(kernel, "_counters", lambda device: None)
    assert torch.equal(kernel.fused_low_rank(x, V, U, bias, chained=True), expected)


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
        assert torch.equal(low_rank(x[:5], V, U, bias), one_launch[:5])  # of any number of tokens
        assert compared == [1]
        low_rank(x, V, U)
        assert compared == [1, 1]
    assert set(module._AGREES.values()) == {True}

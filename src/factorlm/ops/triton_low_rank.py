"""y = U(Vx) + b for few tokens in one launch: a Triton kernel, for CUDA.

With few tokens a product waits for its weights, and two matmuls wait one after the other. Here
some programs compute h = Vx in parts, while the others fetch their first rows of U, wait for h, and
compute U h. In a CUDA graph it also fetches while the kernel before it ends.

**It cannot hang.** What a program does is not decided by its index, since no one promises in which
order a device starts programs. Each draws a number as it starts, and those that draw the lowest
compute h, which waits for nothing. So what the others wait for is running already or done: on any
device, beside any other kernel, and in Triton's interpreter, which runs one program to its end
before the next.

**Nothing is read before it is there.** A program stores its part of h, its threads meet, and one of
them adds to a counter with release semantics at the scope of the device. Who reads what others
stored has read that counter with acquire semantics before, its threads have met, and its loads pass
by the first cache, which may be stale.

**Every run gives the same bits.** A part of h is one sum in one order, whichever program computes
it, and the program that is the last to finish a part of some columns of h adds all of them by their
number.

**The counters are zero again** when the last program has finished, so that a CUDA graph can replay
the launch. Launches that may overlap have counters of their own: each stream, and each launch in a
graph.

Letters: N = tokens, I = in_features, R = rank, O = out_features.
"""

from __future__ import annotations

import functools
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_TOKENS = 16
"""What tensor cores take at once. Of fewer the rest is zero: to multiply and add without them is as
fast for one token, and slower for more."""
BLOCK_R = 16
"""Rows of V that one program takes."""
BLOCK_O = 32
"""Rows of U that one program takes."""
BLOCK_BYTES = 1024
"""Of a row of V or of U that a program holds at once."""
MAX_PARTS = 8
COUNTERS_OF_A_LAUNCH = 64
"""Programs that have started, those that have finished, and the parts of each block of h."""
NUM_COUNTERS = 2**14
"""Launches in CUDA graphs, over the life of a process, that have counters of their own."""
INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, where only float32 has right products."""


@functools.cache
def num_parts(width_in: int, rank: int, itemsize: int, num_processors: int) -> int:
    """Of the columns of V, each with a program of its own: a power of two.

    Up to two programs a processor, and no less than one block of columns for each (on an H100 the
    fastest of 1, 2, 4 and 8 for 2048 -> 512 -> 8192 and for its way back).
    """
    blocks = triton.cdiv(rank, BLOCK_R)
    if blocks > COUNTERS_OF_A_LAUNCH - 2:
        return 1
    columns = triton.cdiv(width_in * itemsize, BLOCK_BYTES)
    most = min(2 * num_processors // blocks, columns, MAX_PARTS)
    return 1 << (max(most, 1).bit_length() - 1)


def num_parts_of(x: Tensor, V: Tensor) -> int:
    """The parts of one call. With the sizes, the dtype and the device they decide what Triton
    compiles."""
    return num_parts(x.shape[1], V.shape[0], x.dtype.itemsize, _num_processors(x.device))


def fused_low_rank(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None, *, chained: bool = False
) -> Tensor:
    """x (N, I) with N up to ``MAX_TOKENS``, V (R, I), U (O, R), bias (O,) -> (N, O).

    All contiguous, on the current device, and of one dtype: float32, bfloat16 or float16. Sums are
    in float32, never TF32, and h is rounded to the dtype in between, as it is by two matmuls. Not
    seen by autograd. In a CUDA graph only with sizes that have been launched before.

    ``chained``: start beside the kernel before, as NVIDIA's GPUs from compute capability 9.0 on
    can, and fetch V and U while it ends, which no kernel ahead of this one may still write. The
    launch needs counters of its own, as in a graph, or a device that is idle.
    """
    num_tokens, width_in = x.shape
    width_out, rank = U.shape
    parts = num_parts_of(x, V)
    y, h = x.new_empty(num_tokens, width_out), x.new_empty(num_tokens, rank)
    held = x.new_empty(parts if parts > 1 else 0, num_tokens, rank, dtype=torch.float32)
    counters = _counters(x.device)
    if counters is None:  # another launch zeroes new ones, which has to end first
        counters, chained = x.new_zeros(COUNTERS_OF_A_LAUNCH, dtype=torch.int32), False
    num_first = triton.cdiv(rank, BLOCK_R) * parts
    num_second = triton.cdiv(width_out, BLOCK_O)
    sizes = (num_tokens, width_in, rank, width_out)
    blocks = (parts, MAX_TOKENS, BLOCK_R, BLOCK_O, BLOCK_BYTES // x.dtype.itemsize)
    _kernel[(num_first + num_second,)](
        x, V, U, bias, y, h, held, counters, *sizes, *blocks, chained, INTERPRETED,
        launch_pdl=chained,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def _kernel(
    x: tl.tensor,
    V: tl.tensor,
    U: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    h: tl.tensor,  # (N, R)
    parts: tl.tensor,  # (NUM_PARTS, N, R), float32
    counters: tl.tensor,  # COUNTERS_OF_A_LAUNCH
    num_tokens: tl.tensor,
    width_in: tl.tensor,
    rank: tl.tensor,
    width_out: tl.tensor,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    num_first = tl.cdiv(rank, BLOCK_R) * NUM_PARTS
    number = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    if CHAINED:
        gdc_launch_dependents()
    if number < num_first:
        _first_product(
            x, V, h, parts, counters + 2, num_tokens, width_in, rank, number,
            NUM_PARTS, BLOCK_N, BLOCK_R, BLOCK_K, CHAINED, WIDEN,
        )  # fmt: skip
    else:
        _second_product(
            h, U, bias, y, counters + 1, num_tokens, rank, width_out, number - num_first, num_first,
            BLOCK_N, BLOCK_O, BLOCK_K, WIDEN,
        )  # fmt: skip
    tl.debug_barrier()  # what all threads stored comes before the release by one of them
    num_before = tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if num_before == tl.num_programs(0) - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit
def _first_product(
    x: tl.tensor,
    V: tl.tensor,
    h: tl.tensor,
    parts: tl.tensor,
    num_stored: tl.tensor,  # parts of each block of h
    num_tokens: tl.tensor,
    width_in: tl.tensor,
    rank: tl.tensor,
    number: tl.tensor,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One part of BLOCK_R columns of h; the last one adds them up."""
    part, block = number % NUM_PARTS, number // NUM_PARTS
    n = tl.arange(0, BLOCK_N)[:, None]
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    width = tl.cdiv(tl.cdiv(width_in, NUM_PARTS), BLOCK_K) * BLOCK_K
    end = min(part * width + width, width_in)
    i = part * width + tl.arange(0, BLOCK_K)[None, :]
    rows = _load_rows(V, r, i, width_in, rank, end)
    if CHAINED:
        gdc_wait()  # until the kernel before has written x
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for _ in tl.range(part * width, end, BLOCK_K, num_stages=1):
        tokens = tl.load(x + n * width_in + i, (n < num_tokens) & (i < end), 0.0)
        i += BLOCK_K
        rows_after = _load_rows(V, r, i, width_in, rank, end)
        total = _add_product(tokens, rows, total, WIDEN)
        rows = rows_after
    at = n * rank + r[None, :]
    inside = (n < num_tokens) & (r[None, :] < rank)
    if NUM_PARTS == 1:
        tl.store(h + at, total, inside)
    else:
        tl.store(parts + part * num_tokens * rank + at, total, inside)
        tl.debug_barrier()
        num_before = tl.atomic_add(num_stored + block, 1, sem="acq_rel", scope="gpu")
        if num_before == NUM_PARTS - 1:
            tl.debug_barrier()
            each = tl.arange(0, NUM_PARTS)[:, None, None] * num_tokens * rank + at[None]
            stored = tl.load(parts + each, inside[None], 0.0, cache_modifier=".cg")
            tl.store(h + at, tl.sum(stored, 0), inside)
            tl.store(num_stored + block, 0)


@triton.jit
def _second_product(
    h: tl.tensor,
    U: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    num_finished: tl.tensor,
    num_tokens: tl.tensor,
    rank: tl.tensor,
    width_out: tl.tensor,
    tile: tl.tensor,
    num_first: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """BLOCK_O columns of y."""
    n = tl.arange(0, BLOCK_N)[:, None]
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)[None, :]
    rows = _load_rows(U, o, k, rank, width_out, rank)  # fetched while h is computed
    while tl.atomic_add(num_finished, 0, sem="acquire", scope="gpu") < num_first:
        pass
    tl.debug_barrier()
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for _ in tl.range(0, rank, BLOCK_K, num_stages=1):
        inside = (n < num_tokens) & (k < rank)
        hidden = tl.load(h + n * rank + k, inside, 0.0, cache_modifier=".cg")
        k += BLOCK_K
        rows_after = _load_rows(U, o, k, rank, width_out, rank)
        total = _add_product(hidden, rows, total, WIDEN)
        rows = rows_after
    o = o[None, :]
    if bias is not None:
        total += tl.load(bias + o, o < width_out, 0.0).to(tl.float32)
    tl.store(y + n * width_out + o, total, (n < num_tokens) & (o < width_out))


@triton.jit
def _load_rows(
    matrix: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
) -> tl.tensor:
    """matrix[row, column], rows ``width`` apart; zero outside."""
    at = matrix + row[:, None] * width + column
    return tl.load(at, (row[:, None] < num_rows) & (column < num_columns), 0.0)


@triton.jit
def _add_product(
    left: tl.tensor,
    right: tl.tensor,
    total: tl.tensor,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """total (a, b) + left (a, k) rightᵀ (k, b), in float32."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, tl.trans(right), total, input_precision="ieee")


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 16  # in the interpreter: enough for more than one part


class _Counters:
    """The counters of one device, zero between launches, and never freed: graphs keep addresses."""

    def __init__(self, device: torch.device) -> None:
        shape = (NUM_COUNTERS, COUNTERS_OF_A_LAUNCH)
        self._rows = torch.zeros(shape, dtype=torch.int32, device=device)
        self._num_taken = 0
        self._of_stream: dict[int, Tensor] = {}

    def take(self) -> Tensor | None:
        """Some that nobody else gets; None where all are taken."""
        if self._num_taken == NUM_COUNTERS:
            return None
        self._num_taken += 1
        return self._rows[self._num_taken - 1]

    def of_stream(self, stream: int) -> Tensor | None:
        """Those of all launches on a stream, which follow one another."""
        if stream not in self._of_stream:
            taken = self.take()
            if taken is None:
                return None
            self._of_stream[stream] = taken
        return self._of_stream[stream]


_COUNTERS: dict[torch.device, _Counters] = {}
_LOCK = threading.Lock()


def _counters(device: torch.device) -> Tensor | None:
    """Counters for a launch that comes now; None where all are taken."""
    cuda = device.type == "cuda"
    captured = cuda and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    with _LOCK:
        if device not in _COUNTERS and not captured:
            _COUNTERS[device] = _Counters(device)
            if cuda:  # before other streams use them
                torch.cuda.current_stream(device).synchronize()
        kept = _COUNTERS.get(device)
        if kept is None:
            return None
        return kept.take() if captured else kept.of_stream(stream)

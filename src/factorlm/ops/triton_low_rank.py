"""y = U(Vx) + b for few tokens in one launch: a Triton kernel, for CUDA.

With few tokens a product waits for its weights, and two matmuls wait one after the other. Here
some programs compute h = Vx in parts, while the others fetch their first rows of U, wait for h, and
compute U h.

**It cannot hang.** What a program does is not decided by its index, since no one promises in which
order a device starts programs. Each draws a number as it starts, and those that draw the lowest
compute h, which waits for nothing. So what the others wait for is running already or done: on any
device, beside any other kernel, and in Triton's interpreter, which runs one program to its end
before the next.

**Nothing is read before it is there.** A program stores its part of h, its threads meet, and one of
them adds to the counter of finished programs with release semantics at the scope of the device. Who
waits reads that counter with acquire semantics, its threads meet, and the loads of h pass by the
first cache, which may be stale.

**Every run gives the same bits.** A part of h is one sum in one order, whichever program computes
it, and the parts are added by their number.

**The counters are zero again** when the last program has finished, so that a CUDA graph can replay
the launch. Launches that may overlap have counters of their own: each stream, and each launch in a
graph.

Letters: N = tokens, I = in_features, R = rank, O = out_features.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R = 16
"""Rows of V that one program takes."""
MIN_COLUMNS = 128
"""Columns of V below which they are not divided further."""
MAX_PARTS = 8
MAX_PARTIAL_ROWS = 128
"""Padded tokens times parts of h: every program of the second product reads so many rows."""
MAX_PARTIAL_VALUES = 8192
"""Of these rows at once: a quarter of the registers that four warps have."""
NUM_COUNTERS = 2**14
"""Launches in CUDA graphs, over the life of a process, that have counters of their own."""
INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, where only float32 has right products."""


class Tiles(NamedTuple):
    """How the two products are divided. Powers of two."""

    num_parts: int
    """Of the columns of V, each with a program of its own."""
    block_n: int
    """N, padded."""
    block_o: int
    """Rows of U that one program takes."""
    block_k: int
    """Columns of V or of U that a program holds at once."""


@functools.cache
def tiles(
    num_tokens: int, width_in: int, rank: int, width_out: int, itemsize: int, num_processors: int
) -> Tiles:
    """About one program a processor for V, up to two for U, and no more values than registers."""
    block_n = triton.next_power_of_2(num_tokens)
    spare = num_processors // triton.cdiv(rank, BLOCK_R)
    most = min(spare, width_in // MIN_COLUMNS, MAX_PARTS, MAX_PARTIAL_ROWS // block_n)
    num_parts = 1 << (max(most, 1).bit_length() - 1)
    block_o = triton.next_power_of_2(triton.cdiv(width_out, 2 * num_processors))
    block_k = min(MAX_PARTIAL_VALUES // (num_parts * block_n), 256 if itemsize == 2 else 64)
    return Tiles(num_parts, block_n, min(max(block_o, 16), 32), block_k)


def tiles_of(x: Tensor, V: Tensor, U: Tensor) -> Tiles:
    """The tiles of one call. With the sizes, the dtype and the device they decide what Triton
    compiles."""
    processors = _num_processors(x.device)
    return tiles(x.shape[0], x.shape[1], V.shape[0], U.shape[0], x.dtype.itemsize, processors)


def fused_low_rank(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I), V (R, I), U (O, R), bias (O,) -> (N, O).

    All contiguous, on the current device, and of one dtype: float32, bfloat16 or float16. Sums are
    in float32, never TF32, and h is rounded to the dtype in between, as it is by two matmuls. Not
    seen by autograd. In a CUDA graph only with sizes that have been launched before.
    """
    num_tokens, width_in = x.shape
    width_out, rank = U.shape
    chosen = tiles_of(x, V, U)
    y = x.new_empty(num_tokens, width_out)
    parts = x.new_empty(chosen.num_parts, num_tokens, rank, dtype=torch.float32)
    num_first = triton.cdiv(rank, BLOCK_R) * chosen.num_parts
    num_second = triton.cdiv(width_out, chosen.block_o)
    counters = _counters(x.device)
    sizes = (num_tokens, width_in, rank, width_out)
    blocks = (chosen.num_parts, chosen.block_n, BLOCK_R, chosen.block_o, chosen.block_k)
    _kernel[(num_first + num_second,)](
        x, V, U, bias, y, parts, counters, *sizes, *blocks, INTERPRETED
    )
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def _kernel(
    x: tl.tensor,
    V: tl.tensor,
    U: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,  # (NUM_PARTS, N, R), float32
    counters: tl.tensor,  # programs that have started, and that have finished
    num_tokens: tl.tensor,
    width_in: tl.tensor,
    rank: tl.tensor,
    width_out: tl.tensor,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    num_first = tl.cdiv(rank, BLOCK_R) * NUM_PARTS
    number = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    if number < num_first:
        _first_product(
            x, V, parts, num_tokens, width_in, rank, number,
            NUM_PARTS, BLOCK_N, BLOCK_R, BLOCK_K, WIDEN,
        )  # fmt: skip
    else:
        _second_product(
            parts, U, bias, y, counters, num_tokens, rank, width_out, number - num_first, num_first,
            NUM_PARTS, BLOCK_N, BLOCK_O, BLOCK_K, WIDEN,
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
    parts: tl.tensor,
    num_tokens: tl.tensor,
    width_in: tl.tensor,
    rank: tl.tensor,
    number: tl.tensor,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One part of BLOCK_R columns of h."""
    part = number % NUM_PARTS
    n = tl.arange(0, BLOCK_N)[:, None]
    r = number // NUM_PARTS * BLOCK_R + tl.arange(0, BLOCK_R)
    width = tl.cdiv(tl.cdiv(width_in, NUM_PARTS), BLOCK_K) * BLOCK_K
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(part * width, min(part * width + width, width_in), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        tokens = tl.load(x + n * width_in + k, (n < num_tokens) & (k < width_in), 0.0)
        rows = _load_rows(V, r, k, rank, width_in)
        total = _add_product(tokens, rows, total, WIDEN)
    r = r[None, :]
    out = parts + (part * num_tokens + n) * rank + r
    tl.store(out, total, (n < num_tokens) & (r < rank))


@triton.jit
def _second_product(
    parts: tl.tensor,
    U: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    counters: tl.tensor,
    num_tokens: tl.tensor,
    rank: tl.tensor,
    width_out: tl.tensor,
    tile: tl.tensor,
    num_first: tl.tensor,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """BLOCK_O columns of y."""
    n = tl.arange(0, BLOCK_N)[:, None]
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)[None, :]
    part = tl.arange(0, NUM_PARTS)[:, None, None]
    rows = _load_rows(U, o, k, width_out, rank)  # fetched while h is computed
    while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < num_first:
        pass
    tl.debug_barrier()
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for _ in tl.range(0, rank, BLOCK_K, num_stages=1):
        at = parts + (part * num_tokens + n) * rank + k
        mask = (n < num_tokens) & (k < rank)
        hidden = tl.sum(tl.load(at, mask[None], 0.0, cache_modifier=".cg"), 0)
        k += BLOCK_K
        rows_after = _load_rows(U, o, k, width_out, rank)
        total = _add_product(hidden.to(rows.dtype), rows, total, WIDEN)
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
    num_rows: tl.tensor,
    num_columns: tl.tensor,
) -> tl.tensor:
    """matrix[row, column], zero outside."""
    at = matrix + row[:, None] * num_columns + column
    return tl.load(at, (row[:, None] < num_rows) & (column < num_columns), 0.0)


@triton.jit
def _add_product(
    left: tl.tensor, right: tl.tensor, total: tl.tensor, WIDEN: tl.constexpr
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
        # Two are used. With four each pair starts at a multiple of 16 bytes, or Triton would
        # compile another kernel for some of them.
        self._rows = torch.zeros(NUM_COUNTERS, 4, dtype=torch.int32, device=device)
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


def _counters(device: torch.device) -> Tensor:
    """Counters for a launch that comes now. Where none are left, new ones, which cost another
    launch that zeroes them."""
    cuda = device.type == "cuda"
    captured = cuda and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    with _LOCK:
        if device not in _COUNTERS and not captured:
            _COUNTERS[device] = _Counters(device)
            if cuda:  # before other streams use them
                torch.cuda.current_stream(device).synchronize()
        kept = _COUNTERS.get(device)
        taken = None if kept is None else kept.take() if captured else kept.of_stream(stream)
    return torch.zeros(4, dtype=torch.int32, device=device) if taken is None else taken

"""What a device is good at: its matmul rate, which utilisation is relative to, bf16, its memory."""

from __future__ import annotations

import functools
import time

import torch

from factorlm.measure.timing import synchronizer

BUDGET_SECONDS = 0.2
STREAMED_BYTES = 2**28
"""More than the caches of a processor hold."""
SMALLEST, LARGEST = 256, 8192
"""Rows of the square matrices that are tried."""


@functools.cache
def has_fast_bf16(device_type: str) -> bool:
    """Whether matmuls in bf16 run on instructions of their own.

    On a CPU without them one is far slower than in float32.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s (2·n³ a product) of the fastest square ``torch.mm`` seen in about 0.2 s.

    Measured once in a process for each dtype, device and number of threads.
    """
    return _measure(dtype, torch.device(device), torch.get_num_threads(), packed=False)


def packed_flops_per_second(dtype: torch.dtype) -> float | None:
    """The same with a right factor that oneDNN keeps in its own order (``factorlm.ops.packed``), on
    a CPU. None in builds of torch and for dtypes that cannot."""
    try:
        _pack(torch.ones(16, 16, dtype=dtype))
    except (AttributeError, RuntimeError):
        return None
    return _measure(dtype, torch.device("cpu"), torch.get_num_threads(), packed=True)


@functools.cache
def memory_bytes_per_second(device: torch.device | str = "cpu") -> float:
    """Bytes of a sum over more values than caches hold, by the fastest of a few times."""
    device = torch.device(device)
    values = torch.zeros(STREAMED_BYTES // 4, device=device)
    wait = synchronizer(device)
    best = float("inf")
    for _ in range(6):  # the first also fetches the pages
        wait()
        started = time.perf_counter()
        values.sum()
        wait()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best


def machine_limits(device: torch.device | str = "cpu") -> dict[str, float]:
    """The two sides of the roofline, for a record.

    ``fp32_gflops``, ``bf16_gflops``: GFLOP/s of ``torch.mm``, which is what training runs.
    ``fp32_packed_gflops``, ``bf16_packed_gflops``: of packed products, on a CPU; far more where
    torch.mm misses the best kernel (MKL in float32 on AMD). The larger of the two is the machine's
    limit. ``memory_gb_per_second``: GB/s of reading.
    """
    kind = torch.device(device).type
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_fast_bf16(kind) else {})
    rates = {}
    for name, dtype in dtypes.items():
        rates[f"{name}_gflops"] = matmul_flops_per_second(dtype, device) / 1e9
        packed = packed_flops_per_second(dtype) if kind == "cpu" else None
        if packed is not None:
            rates[f"{name}_packed_gflops"] = packed / 1e9
    return rates | {"memory_gb_per_second": memory_bytes_per_second(device) / 1e9}


@functools.cache
def _measure(dtype: torch.dtype, device: torch.device, num_threads: int, *, packed: bool) -> float:
    size, factors = SMALLEST, _factors(SMALLEST, dtype, device, packed)
    deadline = time.perf_counter() + BUDGET_SECONDS
    best = 0.0
    while True:
        seconds = _seconds(*factors)
        best = max(best, 2 * size**3 / seconds)
        left = deadline - time.perf_counter()
        # Small products wait more than they compute: take the largest that the budget allows.
        if left > 2 * 8 * seconds and size < LARGEST:
            size *= 2
            factors = _factors(size, dtype, device, packed)
        elif left < seconds:
            return best


def _factors(
    size: int, dtype: torch.dtype, device: torch.device, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose first product, which sets up its kernel, is done.

    Random, since constants draw less power; from a generator of their own, which leaves a run's
    random state alone.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, size, size)
    left, right = torch.randn(shape, device=device, generator=generator).to(dtype)
    right = _pack(right) if packed else right
    _seconds(left, right)
    return left, right


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, len(weight))
    return packed


@torch.no_grad()
def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    synchronizer(left.device)()
    started = time.perf_counter()
    _product(left, right)
    synchronizer(left.device)()
    return time.perf_counter() - started


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left rightᵀ where ``right`` is packed, left right where it is not: the same work."""
    if right.is_mkldnn:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return y
    return torch.mm(left, right)

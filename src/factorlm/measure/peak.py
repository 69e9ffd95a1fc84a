"""The matmul rate that a device reaches: what model FLOP utilisation is relative to."""

from __future__ import annotations

import functools
import time

import torch

BUDGET_SECONDS = 0.2
LONG_ENOUGH_SECONDS = 0.005
"""Of one product: then what surrounds it does not count."""
SMALLEST, LARGEST = 256, 8192
"""Rows of the square matrices that are tried."""


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s (2·n³ a product) of the fastest square matmul seen in about 0.2 s.

    Measured once in a process for each dtype, device and number of threads.
    """
    return _measure(dtype, torch.device(device), torch.get_num_threads())


@functools.cache
def _measure(dtype: torch.dtype, device: torch.device, num_threads: int) -> float:
    # Numbers of its own: constants draw less power than weights do, and a run's random state is
    # not touched.
    generator = torch.Generator(device).manual_seed(0)
    best, size, deadline = 0.0, SMALLEST, time.perf_counter() + BUDGET_SECONDS
    while best == 0 or time.perf_counter() < deadline:
        shape = (2, size, size)
        left, right = torch.randn(shape, device=device, generator=generator).to(dtype)
        _seconds(left, right)  # the first product of a size sets up its kernel
        seconds = _seconds(left, right)
        best = max(best, 2 * size**3 / seconds)
        if seconds < LONG_ENOUGH_SECONDS and size < LARGEST:
            size *= 2
    return best


@torch.no_grad()
def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait_for(left.device)
    started = time.perf_counter()
    torch.mm(left, right)
    _wait_for(left.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

"""What a layer's matmuls take by a formula, where nothing was measured.

An operation takes max(FLOPs / rate, bytes / bandwidth), plus a fixed overhead: the roofline model
(Williams, Waterman, Patterson, *Roofline*, 2009) with the cost of starting an operation. It is
there to tell few tokens from many, not to predict a time.

Letters: I = in_features, O = out_features, N = tokens, G = num_blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from factorlm.inference.latency import LatencyTable, LayerCase, TokenLatency
from factorlm.layers import LowRankConfig
from factorlm.measure import has_fast_bf16
from factorlm.ops.low_rank import expects_one_launch

TOKEN_COUNTS = tuple(2**power for power in range(17))
"""1 to 65536. Beyond the last one the last one decides."""
UNCERTAINTY = 0.1
"""A merged copy that the formula finds faster by less than this share is not."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the formula knows of a device."""

    flops_per_second: float
    bytes_per_second: float
    overhead_ms: float
    """Of starting one operation."""


def machine_of(device_type: str, dtype: torch.dtype, num_threads: int) -> Machine:
    """The constants, all of them. Their ratios decide, and only near the crossing.

    A processor: a core with AVX2 does 2 x 8 fused multiply-adds in float32 a cycle, 96 GFLOP/s at
    3 GHz, of which a matmul reaches most; half precision is 2.5 times that where it has its own
    instructions, else no faster. One core streams some 10 GB/s of DDR4 (25.6 GB/s a channel), and
    many share the channels of a socket. PyTorch spends some microseconds of Python, dispatch and
    allocation on an operation.

    An accelerator: NVIDIA's data sheet of the A100 (40 GB): 312 TFLOP/s in half precision, 19.5 in
    float32, 1,555 GB/s. Few tokens are those of a decoding step, which is a CUDA graph; what a
    kernel adds to it by starting and ending is assumed, not measured: two microseconds.
    """
    half = dtype.itemsize <= 2
    if device_type == "cpu":
        speedup = 2.5 if half and has_fast_bf16("cpu") else 1.0
        return Machine(
            flops_per_second=num_threads * 80e9 * speedup * min(1.0, 4 / dtype.itemsize),
            bytes_per_second=min(num_threads * 10e9, 200e9),
            overhead_ms=3e-3,
        )
    return Machine(
        flops_per_second=312e12 if half else 19.5e12, bytes_per_second=1.555e12, overhead_ms=2e-3
    )


def estimated_table(case: LayerCase, machine: Machine | None = None) -> LatencyTable:
    """The formula's latencies of ``case``; ``machine`` None takes ``machine_of`` its device."""
    if machine is None:
        machine = machine_of(case.device_type, case.dtype, torch.get_num_threads())
    return LatencyTable(tuple(_estimate(case, count, machine) for count in TOKEN_COUNTS))


def _estimate(case: LayerCase, num_tokens: int, machine: Machine) -> TokenLatency:
    sizes = (case.in_features, case.out_features)
    dense = _matmul(num_tokens, case.in_features * case.out_features, *sizes)

    def milliseconds(operation: _Operation) -> float:
        arithmetic = operation.flops / machine.flops_per_second
        traffic = operation.num_values * case.dtype.itemsize / machine.bytes_per_second
        return 1000 * max(arithmetic, traffic) + machine.overhead_ms

    operations = list(_structured(case, num_tokens))
    if isinstance(case.config, LowRankConfig) and _starts_once(case, num_tokens):
        operations = [_Operation(*map(sum, zip(*operations, strict=True)))]
    structured_ms = sum(map(milliseconds, operations))
    return TokenLatency(
        num_tokens=num_tokens,
        structured_ms=structured_ms,
        merged_ms=milliseconds(dense),
        noise_ms=UNCERTAINTY * structured_ms,
    )


def _starts_once(case: LayerCase, num_tokens: int) -> bool:
    """Whether low_rank takes one launch on a device of this machine that ``case`` is of."""
    count = torch.cuda.device_count() if case.device_type == "cuda" else 0
    devices = (torch.device("cuda", index) for index in range(count))
    num_weights = case.config.num_params(case.in_features, case.out_features)
    return any(
        torch.cuda.get_device_name(device) == case.device_name
        and expects_one_launch(device, case.dtype, num_tokens, num_weights)
        for device in devices
    )


class _Operation(NamedTuple):
    flops: int
    num_values: int
    """Numbers read and written."""


def _matmul(num_tokens: int, num_weights: int, width_in: int, width_out: int) -> _Operation:
    return _Operation(
        2 * num_tokens * num_weights, num_weights + num_tokens * (width_in + width_out)
    )


def _structured(case: LayerCase, num_tokens: int) -> Iterator[_Operation]:
    """One matmul a factor. What orders the outputs of a block-diagonal one is started too, on an
    accelerator only after the last, since there a batched product writes where the next one reads.
    The values that it moves are not counted: kernels may write them where they belong."""
    factors = case.config.factors(case.in_features, case.out_features)
    for factor in factors:
        width_out = factor.num_blocks * factor.fan_out
        width_in = factor.num_blocks * factor.fan_in
        yield _matmul(num_tokens, factor.num_params, width_in, width_out)
        if factor.num_blocks > 1 and (case.device_type == "cpu" or factor is factors[-1]):
            yield _Operation(0, 0)

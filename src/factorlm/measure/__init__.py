"""What this machine is and how fast it does things."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.measure.hardware import cpu_name, environment, free_memory_bytes
    from factorlm.measure.peak import (
        has_fast_bf16,
        machine_limits,
        matmul_flops_per_second,
        memory_bytes_per_second,
    )
    from factorlm.measure.timing import Measurement, measure_latency, synchronizer

__all__ = [
    "Measurement",
    "cpu_name",
    "environment",
    "free_memory_bytes",
    "has_fast_bf16",
    "machine_limits",
    "matmul_flops_per_second",
    "measure_latency",
    "memory_bytes_per_second",
    "synchronizer",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Measurement": "timing",
        "cpu_name": "hardware",
        "environment": "hardware",
        "free_memory_bytes": "hardware",
        "has_fast_bf16": "peak",
        "machine_limits": "peak",
        "matmul_flops_per_second": "peak",
        "measure_latency": "timing",
        "memory_bytes_per_second": "peak",
        "synchronizer": "timing",
    },
)

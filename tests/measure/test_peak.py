from __future__ import annotations

import math

import pytest
import torch

from factorlm.measure import matmul_flops_per_second, peak


def test_measured_once_per_dtype_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    peak._measure.cache_clear()
    monkeypatch.setattr(peak, "BUDGET_SECONDS", 0.0)
    first = matmul_flops_per_second(torch.float32)
    assert math.isfinite(first)
    assert first > 1e6
    assert matmul_flops_per_second(torch.float32, "cpu") == first
    assert peak._measure.cache_info().misses == 1
    matmul_flops_per_second(torch.bfloat16)
    assert peak._measure.cache_info().misses == 2


def test_rate_is_the_best_of_growing_products(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    def mm(left: torch.Tensor, right: torch.Tensor) -> None:
        size = len(left)
        seen.append(size)
        now[0] += {256: 0.001, 512: 0.002, 1024: 0.016}[size]

    peak._measure.cache_clear()
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(peak.torch, "mm", mm)
    assert matmul_flops_per_second(torch.float32) == pytest.approx(2 * 512**3 / 0.002)
    assert seen == [256] * 2 + [512] * 2 + [1024] * 12
    peak._measure.cache_clear()


def test_packed_products_are_timed_apart_from_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def seconds(left: torch.Tensor, right: torch.Tensor) -> float:
        seen.append(right.is_mkldnn)
        return 1.0 if right.is_mkldnn else 2.0

    peak._measure.cache_clear()
    monkeypatch.setattr(peak, "_seconds", seconds)
    monkeypatch.setattr(peak, "BUDGET_SECONDS", 0.0)
    packed = peak.packed_flops_per_second(torch.float32)
    assert packed == 2 * 256**3
    assert all(seen)
    assert matmul_flops_per_second(torch.float32) == packed / 2
    peak._measure.cache_clear()


def test_a_packed_product_is_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(2, 8, 8)
    found = peak._product(left, peak._pack(right))
    torch.testing.assert_close(found, left @ right.t())


def test_what_cannot_be_packed_has_no_rate() -> None:
    assert peak.packed_flops_per_second(torch.float64) is None


def test_limits_are_both_sides_of_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "matmul_flops_per_second", lambda dtype, device: 3e9)
    monkeypatch.setattr(peak, "packed_flops_per_second", lambda dtype: 7e9)
    monkeypatch.setattr(peak, "has_fast_bf16", lambda kind: False)
    monkeypatch.setattr(peak, "STREAMED_BYTES", 4096)
    peak.memory_bytes_per_second.cache_clear()
    found = peak.machine_limits("cpu")
    peak.memory_bytes_per_second.cache_clear()
    assert list(found) == ["fp32_gflops", "fp32_packed_gflops", "memory_gb_per_second"]
    assert (found["fp32_gflops"], found["fp32_packed_gflops"]) == (3, 7)
    assert 0 < found["memory_gb_per_second"] < 1e5

"""The formula in its limits, by hand."""

from __future__ import annotations

import pytest
import torch

from factorlm.inference import LayerCase
from factorlm.inference.roofline import Machine, estimated_table, machine_of
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, StructureConfig
from factorlm.ops.low_rank import has_kernel

STRUCTURES: dict[str, StructureConfig] = {
    "low_rank": LowRankConfig(),
    "block_shuffle": BlockShuffleConfig(),
    "block_dense": BlockDenseConfig(),
}


def case_of(
    name: str,
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device_type: str = "cpu",
    ratio: float = 0.32,
) -> LayerCase:
    config = STRUCTURES[name].for_param_ratio(in_features, out_features, ratio)
    return LayerCase(
        config=config,
        in_features=in_features,
        out_features=out_features,
        bias=True,
        dtype=dtype,
        device_type=device_type,
        device_name="any",
    )


def machine(*, overhead_ms: float) -> Machine:
    return Machine(flops_per_second=1e12, bytes_per_second=1e10, overhead_ms=overhead_ms)


def test_the_formula_by_hand() -> None:
    """One token of 100 -> 300 by rank 10 in float32: weights and values are all that matters."""
    config = LowRankConfig(rank=10)
    case = LayerCase(
        config=config,
        in_features=100,
        out_features=300,
        bias=False,
        dtype=torch.float32,
        device_type="cpu",
        device_name="any",
    )
    first, *_, last = estimated_table(case, machine(overhead_ms=0.5)).rows
    assert first.num_tokens == 1
    structured = ((1000 + 110) + (3000 + 310)) * 4 / 1e10
    assert first.structured_ms == pytest.approx(1000 * structured + 2 * 0.5)
    assert first.merged_ms == pytest.approx(1000 * (30_000 + 400) * 4 / 1e10 + 0.5)
    n = last.num_tokens
    merged = max(2 * 30_000 * n / 1e12, (30_000 + 400 * n) * 4 / 1e10)
    assert last.merged_ms == pytest.approx(1000 * merged + 0.5)


MACHINES = {
    "NVIDIA, 9.0": ((9, 0), None, True),
    "NVIDIA, 8.0": ((8, 0), None, True),
    "NVIDIA, 7.5": ((7, 5), None, True),
    "AMD": ((9, 4), "7.0", True),
    "NVIDIA, 9.0, without Triton": ((9, 0), None, False),
}
"""Compute capability, version of HIP, whether Triton is there."""


@pytest.mark.parametrize("machine_name", MACHINES)
def test_low_rank_on_a_gpu_that_has_the_kernel_starts_once_for_few_tokens(
    machine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device of the machine, with another of another kind beside it."""
    capability, hip, triton = MACHINES[machine_name]
    one_launch = machine_name in ("NVIDIA, 9.0", "NVIDIA, 8.0")
    for name, value in {
        "device_count": lambda: 2,
        "get_device_name": lambda device: ["other", "any"][device.index],
        "get_device_capability": lambda device: [(5, 0), capability][device.index],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("factorlm.ops.low_rank.has_triton", lambda: triton)
    monkeypatch.setattr("factorlm.ops.low_rank.has_kernel", has_kernel.__wrapped__)
    for name, dtype, width, starts in (
        ("low_rank", torch.bfloat16, 768, {1: 2 - one_launch, 16: 2 - one_launch, 32: 2}),
        ("low_rank", torch.bfloat16, 4096, {1: 2 - one_launch}),
        ("low_rank", torch.float32, 4096, {1: 2}),  # 43 MB of factors
        ("low_rank", torch.float64, 768, {1: 2}),
        ("block_dense", torch.bfloat16, 768, {1: 2}),
    ):
        case = case_of(name, width, 4 * width, dtype=dtype, device_type="cuda", ratio=0.16)
        free, dear = (estimated_table(case, machine(overhead_ms=ms)).rows for ms in (0.0, 1.0))
        found = {
            row.num_tokens: round(row.structured_ms - base.structured_ms)
            for row, base in zip(dear, free, strict=True)
        }
        assert {count: found[count] for count in starts} == starts


@pytest.mark.parametrize(
    ("name", "device_type", "starts"),
    [
        ("block_dense", "cpu", 3),
        ("block_dense", "cuda", 2),
        ("block_shuffle", "cpu", 4),
        ("block_shuffle", "cuda", 3),
    ],
)
def test_blocks_start_what_orders_their_outputs(name: str, device_type: str, starts: int) -> None:
    """On a GPU a batched product writes where the next one reads: only the last shuffle is left."""
    case = case_of(name, 768, 3072, device_type=device_type)
    free, dear = (estimated_table(case, machine(overhead_ms=ms)).rows[0] for ms in (0.0, 1.0))
    assert round(dear.structured_ms - free.structured_ms) == starts


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(768, 3072), (3072, 768), (2048, 8192)])
def test_many_tokens_take_the_factors(
    name: str, device_type: str, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    policy = estimated_table(case_of(name, *sizes, dtype=dtype, device_type=device_type)).policy
    assert not any(policy.merges(n) for n in (4096, 65536, 10**7))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("sizes", [(64, 256), (768, 3072), (2048, 8192)])
def test_without_overhead_the_fewer_bytes_of_the_factors_win_at_one_token(
    name: str, sizes: tuple[int, int]
) -> None:
    policy = estimated_table(case_of(name, *sizes), machine(overhead_ms=0.0)).policy
    assert not policy.merges(1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_overhead_alone_makes_one_matmul_win_at_few_tokens(name: str) -> None:
    policy = estimated_table(case_of(name, 768, 3072), machine(overhead_ms=100.0)).policy
    assert policy.merges(1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_wide_layer_on_a_processor_is_never_merged_and_a_tiny_one_is(name: str) -> None:
    assert not estimated_table(case_of(name, 2048, 8192)).policy.ever_merges
    assert estimated_table(case_of(name, 32, 64)).policy.merges(1)


def test_factors_that_hold_more_than_the_dense_weight_are_merged() -> None:
    """A rank so high that R (I + O) > I O."""
    policy = estimated_table(case_of("low_rank", 768, 3072, ratio=1.25)).policy
    assert policy.merges(1)
    assert policy.merges(10**6)


def test_constants_grow_with_threads_and_shrink_with_precision() -> None:
    one, many = (machine_of("cpu", torch.float32, threads) for threads in (1, 16))
    assert many.flops_per_second == 16 * one.flops_per_second
    assert one.bytes_per_second < many.bytes_per_second <= 200e9
    wide = machine_of("cpu", torch.float64, 1)
    assert wide.flops_per_second == one.flops_per_second / 2
    half, single = (machine_of("cuda", d, 1) for d in (torch.bfloat16, torch.float32))
    assert half.flops_per_second > single.flops_per_second

"""Layers with merged copies, by tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.bench.test_linear import timings
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from factorlm.bench import BenchOptions, premerge
from factorlm.bench.premerge import (
    FACTORS,
    TWO,
    benchmark_premerge,
    build_layers,
    measure_premerge,
    premerge_bars,
    timed_forward,
)
from factorlm.errors import NumericError
from factorlm.inference import capture as capture_module
from factorlm.layers import BlockDenseConfig, LowRankConfig, MergePolicy, PreMergedLinear
from factorlm.layers import premerged as premerged_module

OPTIONS = BenchOptions(
    shapes=((16, 64),), num_tokens=(1, 4), dtypes=("fp32",), rounds=2, structures=("low_rank",)
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path))


def test_every_number_of_tokens_has_a_record(tmp_path: Path) -> None:
    one, four = benchmark_premerge(OPTIONS)
    assert [record.settings["num_tokens"] for record in (one, four)] == [1, 4]
    assert set(one.cases) - {"dense, packed"} == {"dense", "low_rank"}
    assert len(list(tmp_path.rglob("*.json"))) == 1  # the table of its layer


def test_the_copy_is_made_before_anything_is_timed() -> None:
    layer = PreMergedLinear(LowRankConfig(rank=4).build(16, 64), MergePolicy.always()).eval()
    layers = {"dense": [nn.Linear(16, 64)], "low_rank": [layer]}
    record = measure_premerge(OPTIONS, layers, (16, 64), 4, "fp32")
    assert layer.has_copy
    assert record.settings["merged"] == {"low_rank": True}


def test_layers_are_in_use_not_in_training() -> None:
    layers = build_layers(OPTIONS, (16, 64), "fp32")
    assert not any(layer.training for several in layers.values() for layer in several)
    with torch.no_grad():
        x = torch.randn(3, 16)
        (merged,) = layers["low_rank"]
        assert isinstance(merged, PreMergedLinear)
        torch.testing.assert_close(merged(x), merged.structured(x))


def merged_or_not(policy: MergePolicy) -> dict[str, list[nn.Module]]:
    layer = PreMergedLinear(LowRankConfig(rank=4).build(16, 64, bias=False), policy).eval()
    return {"dense": [nn.Linear(16, 64, bias=False)], "low_rank": [layer]}


@pytest.mark.parametrize("policy", [MergePolicy.always(), MergePolicy.never()], ids=str)
def test_a_wrong_packed_product_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, policy: MergePolicy
) -> None:
    """The bare layer is right: it is the form in use that is compared, merged or packed."""

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight.to_dense() if weight.is_mkldnn else weight, bias) * 1.01

    measure_premerge(OPTIONS, merged_or_not(policy), (16, 64), 4, "fp32")
    monkeypatch.setattr("factorlm.layers.premerged.linear_packed", wrong)
    with pytest.raises(NumericError, match=r"low_rank with 4 tokens: output .* off by 0\.0"):
        measure_premerge(OPTIONS, merged_or_not(policy), (16, 64), 4, "fp32")


def test_every_number_of_tokens_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong for the fourth token alone, which one token does not show."""

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight.to_dense() if weight.is_mkldnn else weight, bias)
        return y if len(x) < 4 else torch.cat([y[:3], 2 * y[3:]])

    layers = merged_or_not(MergePolicy.always())
    monkeypatch.setattr("factorlm.layers.premerged.linear_packed", wrong)
    measure_premerge(OPTIONS, layers, (16, 64), 1, "fp32")
    with pytest.raises(NumericError, match="low_rank with 4 tokens"):
        measure_premerge(OPTIONS, layers, (16, 64), 4, "fp32")


class OnGPU(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 1)  # type: ignore[assignment]


@pytest.mark.parametrize("policy", [MergePolicy.always(), MergePolicy.never()], ids=str)
def test_on_a_gpu_the_layer_itself_is_captured_as_by_a_decoder(
    monkeypatch: pytest.MonkeyPatch, policy: MergePolicy
) -> None:
    """With the copy, if the table says so. In float64, so that nothing is packed."""
    capturing, devices, flops = [False], [], []

    def record(step, device):
        devices.append(device)
        step()
        capturing[0] = True
        with FlopCounterMode(display=False) as counter:
            output = step()
        capturing[0] = False
        flops.append(counter.get_total_flops())
        return lambda: output

    monkeypatch.setattr(capture_module, "record", record)
    monkeypatch.setattr(premerged_module, "_is_captured", lambda x: capturing[0])
    structured = BlockDenseConfig(num_blocks=2, rank=4).build(16, 64, dtype=torch.float64)
    layer = PreMergedLinear(structured, policy).eval()
    x = torch.randn(4, 16, dtype=torch.float64)
    run = timed_forward([layer], x.as_subclass(OnGPU))
    torch.testing.assert_close(run().as_subclass(Tensor), structured(x).detach())
    dense, factors = 2 * 4 * 16 * 64, 4 * structured.config.flops_per_token(16, 64)
    assert flops == [dense if policy.ever_merges else factors]
    assert layer.has_copy == policy.ever_merges
    assert devices == [torch.device("cuda", 1)]
    timed_forward([layer], x)
    assert len(devices) == 1


def test_on_a_gpu_few_tokens_have_the_factors_as_a_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And as two matmuls, where they take one launch."""
    has_it = [True]
    monkeypatch.setattr("factorlm.ops.low_rank.has_kernel", lambda device: has_it[0])
    layers = merged_or_not(MergePolicy.always())
    few, more, many = (torch.randn(count, 16).as_subclass(OnGPU) for count in (16, 64, 65))
    forms = premerge._forms(layers, few)
    assert list(forms) == [FACTORS, TWO]
    by_factors, by_two = (form[0](few.as_subclass(Tensor)) for form in forms.values())
    torch.testing.assert_close(by_two, by_factors)
    assert list(premerge._forms(layers, more)) == [FACTORS]
    assert premerge._forms(layers, many) == premerge._forms({}, few) == {}
    assert premerge._forms(layers, few.as_subclass(Tensor)) == {}
    has_it[0] = False
    assert list(premerge._forms(layers, few)) == [FACTORS]


def test_on_a_gpu_as_many_layers_take_turns_as_a_cache_cannot_hold() -> None:
    low_rank, cuda = [LowRankConfig(rank=512)], torch.device("cuda")
    count = premerge._num_layers(cuda, (2048, 8192), low_rank, torch.bfloat16)
    weights = 2 * 512 * (2048 + 8192)
    assert (count - 1) * weights < premerge.COLD_BYTES <= count * weights
    small = [LowRankConfig(rank=16)]
    assert premerge._num_layers(cuda, (64, 256), small, torch.bfloat16) == premerge.MAX_LAYERS
    assert premerge._num_layers(torch.device("cpu"), (64, 256), small, torch.bfloat16) == 1


def test_latencies_are_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several that one call runs."""
    found = timings({"dense": 100.0, "low_rank": 1.0}).by_name
    monkeypatch.setattr("factorlm.bench.cases.measure_latency", lambda *args, **options: found)
    layers = merged_or_not(MergePolicy.never())
    layers["dense"] *= 50
    record = measure_premerge(OPTIONS, layers, (16, 64), 4, "fp32")
    assert record.settings["num_layers"] == 50
    assert {name: case["median_ms"] for name, case in record.cases.items()} == {
        "dense": pytest.approx(2.0),
        "low_rank": 1.0,
    }
    assert record.cases["low_rank"]["speedup"] == pytest.approx(2.0)


def test_bars_allow_three_percent_and_five_microseconds() -> None:
    times = timings({"dense": 1.0, "low_rank": 1.02, "block_dense": 0.5})
    bars = premerge_bars((512, 2048), 1, "fp32", 0.3, times)
    assert [(bar.value, bar.limit, bar.at_most) for bar in bars] == [
        (pytest.approx(1.015), 1.03, True),
        (pytest.approx(0.495), 1.03, True),
    ]
    assert premerge_bars((256, 1024), 1, "fp32", 0.3, times) == []
    wide = premerge_bars((2048, 8192), 1, "bf16", 0.3, times)[-1]
    assert (wide.value, wide.limit, wide.at_most) == (pytest.approx(1 / 1.02), 2.5, False)
    for num_tokens, dtype, share in ((2, "bf16", 0.3), (1, "fp32", 0.3), (1, "bf16", 0.5)):
        bars = premerge_bars((2048, 8192), num_tokens, dtype, share, times)
        assert [bar.limit for bar in bars] == [1.03, 1.03]


@pytest.mark.parametrize("width", [2048, 5120])
def test_bar_of_few_tokens_on_a_gpu(width: int) -> None:
    """The factors are held against dense, not what the table chose."""
    shape, times = (width, 4 * width), timings({"dense": 3.0, "low_rank": 2.9, FACTORS: 2.5})
    chosen, factors = premerge_bars(shape, 64, "bf16", 0.3, times)
    assert chosen.name == "low_rank less 5 µs / dense"
    assert (factors.name, factors.limit, factors.at_most) == (f"dense / {FACTORS}", 1.5, False)
    assert factors.value == pytest.approx(1.2)
    assert len(premerge_bars(shape, 64, "bf16", 0.5, times)) == 1
    assert len(premerge_bars((1024, 4096), 64, "bf16", 0.3, times)) == 1

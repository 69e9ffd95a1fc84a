"""Layers with merged copies, by tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.bench.test_linear import timings
from torch import nn

from factorlm.bench import BenchOptions
from factorlm.bench.premerge import (
    benchmark_premerge,
    build_layers,
    measure_premerge,
    premerge_bars,
)
from factorlm.layers import LowRankConfig, MergePolicy, PreMergedLinear

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
    layers = {"dense": nn.Linear(16, 64), "low_rank": layer}
    record = measure_premerge(OPTIONS, layers, (16, 64), 4, "fp32")
    assert layer.has_copy
    assert record.settings["merged"] == {"low_rank": True}


def test_layers_are_in_use_not_in_training() -> None:
    layers = build_layers(OPTIONS, (16, 64), "fp32")
    assert not any(layer.training for layer in layers.values())
    with torch.no_grad():
        x = torch.randn(3, 16)
        merged = layers["low_rank"]
        assert isinstance(merged, PreMergedLinear)
        torch.testing.assert_close(merged(x), merged.structured(x))


def test_bars_allow_three_percent_and_five_microseconds() -> None:
    times = timings({"dense": 1.0, "low_rank": 1.02, "block_dense": 0.5})
    bars = premerge_bars((512, 2048), 1, "fp32", times)
    assert [(bar.value, bar.limit, bar.at_most) for bar in bars] == [
        (pytest.approx(1.015), 1.03, True),
        (pytest.approx(0.495), 1.03, True),
    ]
    assert premerge_bars((256, 1024), 1, "fp32", times) == []
    wide = premerge_bars((2048, 8192), 1, "bf16", times)[-1]
    assert (wide.value, wide.limit, wide.at_most) == (pytest.approx(1 / 1.02), 2.5, False)

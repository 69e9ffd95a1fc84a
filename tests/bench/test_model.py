"""Whole training steps."""

from __future__ import annotations

import pytest
from tests.bench.test_linear import timings

from factorlm.bench import BenchOptions
from factorlm.bench.model import ModelShape, benchmark_model, model_bars
from factorlm.errors import ConfigError
from factorlm.layers import StructuredLinear

OPTIONS = BenchOptions(num_tokens=(64,), dtypes=("fp32",), rounds=2, structures=("low_rank",))
SHAPE = ModelShape(width=64, num_layers=2, vocab_size=128, context_length=32)


def test_the_model_is_a_gpt_whose_first_ffn_is_dense() -> None:
    model = SHAPE.build("low_rank", OPTIONS)
    names = [name for name, m in model.named_modules() if isinstance(m, StructuredLinear)]
    assert len(names) == 2
    assert all(".layers.1." in name for name in names)
    published = ModelShape().build("low_rank", OPTIONS.replace(device="meta"))
    layers = [m for m in published.modules() if isinstance(m, StructuredLinear)]
    assert {layer.config.to_dict()["rank"] for layer in layers} == {192}
    assert len(layers) == 22


def test_a_step_is_timed_beside_its_flops() -> None:
    (record,) = benchmark_model(OPTIONS, SHAPE)
    assert set(record.cases) == {"dense", "low_rank"}
    assert 1 < record.cases["low_rank"]["ideal_speedup"] < 2  # type: ignore[operator]
    assert record.settings["num_tokens"] == 64
    assert record.bars == []


def test_bar_of_a_model() -> None:
    (bar,) = model_bars({"dense": 1.6, "low_rank": 1.0}, timings({"dense": 3.0, "low_rank": 2.0}))
    assert (bar.value, bar.limit, bar.at_most) == (pytest.approx(1.5 / 1.6), 0.9, False)


def test_wrong_shapes_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="width=100 must be a multiple of the head size, 64"):
        ModelShape(width=100)
    with pytest.raises(ConfigError, match="num_layers=1 must be at least 2"):
        ModelShape(num_layers=1)

"""Whole training steps."""

from __future__ import annotations

import pytest
import torch
from tests.bench.test_linear import timings
from tests.bench.test_truth import Halved
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.bench import BenchOptions
from factorlm.bench.model import ModelShape, benchmark_model, check_model, model_bars
from factorlm.errors import ConfigError, NumericError
from factorlm.layers import BlockShuffleConfig, StructuredLinear

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


def compile_by_aot(layer: nn.Module) -> None:
    compiled = torch.compile(layer._call_impl, backend="aot_eager")
    layer._compiled_call_impl = compiled  # type: ignore[assignment]


def test_compiled_steps_are_timed_beside_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", compile_by_aot)
    (record,) = benchmark_model(OPTIONS.replace(compiled=True), SHAPE)
    assert set(record.cases) == {"dense", "low_rank", "dense, compiled", "low_rank, compiled"}
    ideals = {name: case["ideal_speedup"] for name, case in record.cases.items()}
    assert ideals["low_rank, compiled"] == ideals["low_rank"]
    assert ideals["dense, compiled"] == 1
    assert set(record.settings["structures"]) == {"low_rank", "low_rank, compiled"}


def test_a_wrong_compiled_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: nn.Module) -> None:
        plain = layer._call_impl
        layer._compiled_call_impl = lambda *args, **kwargs: plain(*args, **kwargs) * 1.01  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", wrong)
    with pytest.raises(NumericError, match=r"dense, compiled: .* is off by"):
        list(benchmark_model(OPTIONS.replace(compiled=True), SHAPE))


@pytest.mark.parametrize("structure", ["low_rank", "block_shuffle", "block_dense"])
def test_a_right_model_passes_and_keeps_no_gradient(structure: str) -> None:
    model = SHAPE.build(structure, OPTIONS)
    check_model(structure, model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(linear(x, V), U, bias) * 1.01

    monkeypatch.setattr("factorlm.layers.low_rank.low_rank", wrong)
    with pytest.raises(NumericError, match=r"low_rank: .* is off by .*: nothing was timed"):
        list(benchmark_model(OPTIONS, SHAPE))


@pytest.mark.parametrize(
    ("halved", "named"),
    [("x", "gradient of the embedding"), ("V", r"gradient of model\.layers\.1\.mlp\.c_fc\.V")],
)
def test_a_wrong_gradient_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, halved: str, named: str
) -> None:
    """Of the input, which changes what comes before; of a factor, which nothing else shows."""

    def wrong(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
        given = {"x": x, "V": V}
        given[halved] = Halved.apply(given[halved])
        return linear(linear(given["x"], given["V"]), U, bias)

    monkeypatch.setattr("factorlm.layers.low_rank.low_rank", wrong)
    with pytest.raises(NumericError, match=f"low_rank: {named} is off"):
        list(benchmark_model(OPTIONS, SHAPE))


def test_block_shuffle_leaves_its_last_shuffle_out_and_the_record_says_so() -> None:
    options = OPTIONS.replace(structures=("block_shuffle",))
    (record,) = benchmark_model(options, SHAPE)
    assert record.settings["structures"]["block_shuffle"]["output_shuffle"] is False
    layers = [
        module.config
        for module in SHAPE.build("block_shuffle", options).modules()
        if isinstance(module, StructuredLinear)
    ]
    assert len(layers) == 2
    for config in (*layers, options.configs(64, 256)["block_shuffle"]):
        assert isinstance(config, BlockShuffleConfig)
        assert not config.output_shuffle


def test_bar_of_a_model() -> None:
    (bar,) = model_bars({"dense": 1.6, "low_rank": 1.0}, timings({"dense": 3.0, "low_rank": 2.0}))
    assert (bar.value, bar.limit, bar.at_most) == (pytest.approx(1.5 / 1.6), 0.9, False)
    both = {"dense": 3.0, "low_rank": 2.0, "dense, compiled": 2.4, "low_rank, compiled": 1.5}
    flops = {"dense": 1.6, "low_rank": 1.0, "dense, compiled": 1.6, "low_rank, compiled": 1.0}
    plain, compiled = model_bars(flops, timings(both))
    assert plain.value == bar.value
    assert compiled.value == pytest.approx(1.0)


def test_wrong_shapes_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="width=100 must be a multiple of the head size, 64"):
        ModelShape(width=100)
    with pytest.raises(ConfigError, match="num_layers=1 must be at least 2"):
        ModelShape(num_layers=1)

"""Whole training steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bench.test_linear import timings
from tests.bench.test_truth import Halved
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import linear

from factorlm.bench import BenchOptions, measure_cases
from factorlm.bench.model import ModelShape, benchmark_model, model_bars, random_ids
from factorlm.bench.model_truth import NUM_CHECKED, TrueStep
from factorlm.errors import ConfigError, NumericError
from factorlm.layers import BlockShuffleConfig, StructuredLinear
from factorlm.ops import block_shuffle
from factorlm.ops.block_diagonal import FEW_TOKENS
from factorlm.records import BenchmarkRecord

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
    compiled_graphs: list[int] = []

    def noted(*args: Any, **options: Any) -> BenchmarkRecord:
        before = counters["stats"]["unique_graphs"]
        found = measure_cases(*args, **options)
        compiled_graphs.append(counters["stats"]["unique_graphs"] - before)
        assert before > 0
        return found

    monkeypatch.setattr("factorlm.bench.model.measure_cases", noted)
    (record,) = benchmark_model(OPTIONS.replace(compiled=True), SHAPE)
    assert compiled_graphs == [0]  # what was checked is what is timed
    assert set(record.cases) == {"dense", "low_rank", "dense, compiled", "low_rank, compiled"}
    ideals = {name: case["ideal_speedup"] for name, case in record.cases.items()}
    assert ideals["low_rank, compiled"] == ideals["low_rank"]
    assert ideals["dense, compiled"] == 1
    assert set(record.settings["structures"]) == {"low_rank", "low_rank, compiled"}


def test_a_compiled_model_that_is_wrong_in_the_shape_that_is_timed_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(layer: nn.Module) -> None:
        plain = layer._call_impl

        def called(x: Tensor, **options: Any) -> Tensor:
            y: Tensor = plain(x, **options)
            return y * 1.01 if x.shape[:2] == (2, 32) else y

        layer._compiled_call_impl = called  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", wrong)
    with pytest.raises(NumericError, match=r"dense, compiled: .* is off by"):
        list(benchmark_model(OPTIONS.replace(compiled=True), SHAPE))


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("structure", ["low_rank", "block_shuffle", "block_dense"])
def test_a_right_model_passes_and_keeps_no_gradient(structure: str, rows: int) -> None:
    model = SHAPE.build(structure, OPTIONS)
    truth = TrueStep(model, random_ids(model, rows, SHAPE))
    truth.check_alone(structure, model)
    for dtype in ("fp32", "bf16"):
        truth.check(structure, model, dtype)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_step_that_is_timed_is_the_one_that_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of its tokens at once, under its autocast."""
    seen: list[tuple[int, ...]] = []
    right = StructuredLinear.__call__

    def noted(layer: StructuredLinear, x: Tensor) -> Tensor:
        seen.append((*x.shape[:2], torch.is_autocast_enabled("cpu")))
        y: Tensor = right(layer, x)
        return y

    monkeypatch.setattr(StructuredLinear, "__call__", noted)
    list(benchmark_model(OPTIONS.replace(num_tokens=(640,), dtypes=("bf16",)), SHAPE))
    alone, whole = (-(-NUM_CHECKED // 32), 32, False), (20, 32, True)
    assert list(dict.fromkeys(seen)) == [alone, whole]
    assert seen.count(alone) == 2  # the layers of one model


def doubled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if one is None else 2 * one for one in GROUPED_BACKWARD(ctx, grad))


GROUPED_BACKWARD = block_shuffle._Grouped.backward


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_backward_pass_of_many_tokens_is_not_timed(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_shuffle._Grouped, "backward", staticmethod(doubled))
    options = OPTIONS.replace(
        num_tokens=(2 * FEW_TOKENS,), structures=("block_shuffle",), dtypes=(dtype,)
    )
    with pytest.raises(NumericError, match=r"block_shuffle: gradient of .* is off by"):
        list(benchmark_model(options, SHAPE))


def test_what_is_wrong_under_autocast_alone_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(linear(x, V), U, bias)
        return 1.5 * y if torch.is_autocast_enabled("cpu") else y

    monkeypatch.setattr("factorlm.layers.low_rank.low_rank", wrong)
    with pytest.raises(NumericError, match=r"low_rank: .* in bf16 is off by"):
        list(benchmark_model(OPTIONS.replace(dtypes=("bf16",)), SHAPE))


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
    with pytest.raises(NumericError, match=f"low_rank: {named} in fp32 is off"):
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

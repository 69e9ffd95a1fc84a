"""Benchmarks of one linear layer and of an FFN: what is timed is right, what is promised holds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.bench import Bar, BenchmarkCase, BenchOptions, Timings, measure_cases
from factorlm.bench.ffn import ACTIVATION, FFN, benchmark_ffn, ffn_bars
from factorlm.bench.kernel import BARE, GUIDED, bare_matmuls, benchmark_kernel, kernel_bars, step
from factorlm.bench.options import LinearSetting
from factorlm.bench.truth import check_guided, check_linear
from factorlm.errors import ConfigError, NumericError
from factorlm.layers import LowRankConfig, SelfGuidedLinear
from factorlm.measure import Measurement
from factorlm.records import BenchmarkRecord

CPU = torch.device("cpu")
SMALL = BenchOptions(shapes=((16, 64),), num_tokens=(8,), dtypes=("fp32",), rounds=2)


def timings(cases: Mapping[str, float]) -> Timings:
    """As if every round of a case had taken the same time, in ms."""
    return Timings(
        {name: Measurement(latencies_ms=(t, t), calls_per_round=1) for name, t in cases.items()}
    )


def settings_of(shape: tuple[int, int]) -> tuple[LinearSetting, LinearSetting]:
    """(forward and backward, forward)."""
    options = BenchOptions(shapes=(shape,), dtypes=("fp32",))
    forward, both = options.linear_settings()
    return both, forward


def test_a_record_has_every_case_and_the_limit_of_its_flops() -> None:
    forward, both = benchmark_kernel(SMALL)
    assert [r.settings["pass"] for r in (forward, both)] == ["forward", "forward+backward"]
    assert set(both.cases) == {"dense", "low_rank", "block_shuffle", "block_dense", BARE}
    # R = 16 leaves nothing out: 2 IO / 2 R (I + O) = 0.8
    assert both.cases["low_rank"]["ideal_speedup"] == pytest.approx(16 * 64 / (16 * 80))
    dense = both.cases["dense"]
    assert (dense["speedup"], dense["ideal_speedup"], dense["num_tokens"]) == (1.0, None, None)
    assert both.bars == []  # nothing is promised of a size where matmuls do not decide
    assert BenchmarkRecord(**both.__dict__).to_json()


def test_bare_matmuls_are_all_the_products_of_a_step() -> None:
    layer = LowRankConfig(rank=3).build(5, 7, bias=False, dtype=torch.float64)
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(11, 7, dtype=torch.float64)
    y = layer(x)
    U_grad, x_grad, V_grad = torch.autograd.grad(y, [layer.U, x, layer.V], slope)
    found = bare_matmuls(layer.V, layer.U, x, slope, "forward+backward")()
    torch.testing.assert_close(found, (y.detach(), U_grad, x_grad, V_grad))
    forward = bare_matmuls(layer.V, layer.U, x, slope, "forward")()
    torch.testing.assert_close(forward, y.detach())


def test_a_step_leaves_the_gradients_of_its_own_pass() -> None:
    layer = nn.Linear(5, 7)
    x, slope = torch.randn(3, 5), torch.randn(3, 7)
    run = step(layer, x, slope, "forward+backward")
    run()
    run()
    torch.testing.assert_close(layer.weight.grad, slope.t() @ x)
    layer.zero_grad()
    assert not step(layer, x, slope, "forward")().requires_grad  # type: ignore[attr-defined]


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(linear(x, V), U, bias) * 1.01

    monkeypatch.setattr("factorlm.layers.low_rank.low_rank", wrong)
    with pytest.raises(NumericError, match=r"output is off by 0\.01"):
        list(benchmark_kernel(SMALL))
    with pytest.raises(NumericError, match=r"output is off by 0\.01"):
        list(benchmark_ffn(SMALL))


def test_a_wrong_gradient_is_found() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad / 2

    layer = LowRankConfig(rank=3).build(5, 7)
    x = torch.randn(4, 5)
    check_linear(layer, x)
    layer.register_forward_pre_hook(lambda module, args: (Halved.apply(args[0]),))
    with pytest.raises(NumericError, match="gradient of x"):
        check_linear(layer, x)


def test_a_guided_layer_is_held_against_both_maps() -> None:
    layer = SelfGuidedLinear(LowRankConfig(rank=3).build(5, 7), form="merged")
    layer.set_alpha(0.5)
    check_guided(layer, torch.randn(4, 5))
    with torch.no_grad():
        layer.guide.weight += 1.0
    check_guided(layer, torch.randn(4, 5))


def test_bars_of_a_linear() -> None:
    both, forward = settings_of((2048, 8192))
    configs = both.configs
    names = ("dense", "low_rank", "block_shuffle", "block_dense", BARE, GUIDED)
    times = timings(dict(zip(names, (30.0, 10.0, 11.0, 10.0, 9.0, 36.0), strict=True)))
    bars = {bar.name: bar for bar in kernel_bars(both, times)}
    flops = {name: config.flops_per_token(2048, 8192) for name, config in configs.items()}
    expected = {
        "low_rank / its bare matmuls": (10 / 9, 1.03),
        "dense / low_rank": (3.0, 3.0),
        "guided (merged) / dense": (1.2, 1.10),
        "block_dense / low_rank, per FLOP": (flops["low_rank"] / flops["block_dense"], 1.05),
        "block_shuffle / low_rank, per FLOP": (1.1, 1.10),
    }
    assert {name: (pytest.approx(bar.value), bar.limit) for name, bar in bars.items()} == expected
    assert [name for name, bar in bars.items() if not bar.at_most] == ["dense / low_rank"]
    assert [bar.name for bar in kernel_bars(forward, times)] == ["low_rank / its bare matmuls"]


def test_bar_of_an_ffn_pays_the_activation_in_full() -> None:
    """Dense 100 ms, 4 of them GELU: at 3.2 times fewer FLOPs 96/3.2 + 4 = 34 ms are possible."""
    flops = {"dense": 3.2, "low_rank": 1.0}
    times = timings({"dense": 100.0, "low_rank": 40.0, ACTIVATION: 4.0})
    bars = ffn_bars(flops, settings_of((2048, 8192))[0], times)
    assert [(bar.value, bar.limit) for bar in bars] == [
        (pytest.approx(34 / 40), 0.93),
        (pytest.approx(2.5), 2.9),
    ]


def test_the_ffn_is_that_of_transformers() -> None:
    from transformers import Starcoder2Config
    from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

    config = Starcoder2Config(hidden_size=8, intermediate_size=32, hidden_act="gelu")
    theirs = Starcoder2MLP(config).eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(FFN(theirs.c_fc, theirs.c_proj)(x), theirs(x))


def test_every_case_of_an_ffn_is_timed() -> None:
    records = list(benchmark_ffn(SMALL))
    assert len(records) == 2
    for record in records:
        assert {"dense", "low_rank", ACTIVATION} <= set(record.cases)


def test_speedups_are_per_token() -> None:
    cases = {
        "dense": BenchmarkCase(run=lambda: None, num_tokens=2),
        "other": BenchmarkCase(run=lambda: None, num_tokens=6),
    }
    record = measure_cases(
        "decode", {}, cases, device=CPU, rounds=2, min_round_ms=0.01,
        bars=lambda times: [Bar(name="ratio", value=times.ratio("dense", "other"), limit=9)],
    )  # fmt: skip
    assert record.cases["other"]["speedup"] == pytest.approx(3 * record.bars[0]["value"])


def test_speedups_are_the_middle_of_the_rounds_ratios() -> None:
    record = measure_cases(
        "kernel",
        {},
        {name: BenchmarkCase(run=lambda: sum(range(2000))) for name in ("dense", "other")},
        device=CPU,
        rounds=3,
        min_round_ms=0.1,
        bars=lambda times: [Bar(name="ratio", value=times.ratio("dense", "other"), limit=9)],
    )
    assert record.bars[0]["value"] == record.cases["other"]["speedup"]
    assert record.rounds == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, r"share=0.0 must lie in \(0, 1\]"),
        ({"rounds": 1}, "rounds=1 must be at least 2"),
        ({"structures": ("low_rnk",)}, "Did you mean 'low_rank'"),
        ({"dtypes": ("fp8",)}, "dtype 'fp8' must be one of fp32, bf16, fp16"),
        ({"passes": ("backward",)}, "pass 'backward'"),
        ({"num_tokens": (0,)}, "at least 1"),
    ],
)
def test_wrong_options_name_the_rule(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**changes)  # type: ignore[arg-type]


def test_a_structure_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="block_dense for 7x28"):
        BenchOptions(shapes=((7, 28),)).configs(7, 28)

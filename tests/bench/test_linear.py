"""Benchmarks of one linear layer: what is timed, and what is promised of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from factorlm.bench import Bar, BenchmarkCase, BenchOptions, Timings, measure_cases
from factorlm.bench.kernel import GUIDED, benchmark_kernel, kernel_bars, step
from factorlm.bench.options import LinearSetting
from factorlm.errors import ConfigError
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
    assert set(both.cases) == {
        *("dense", "low_rank", "block_shuffle", "block_dense"),
        *(f"{name}, bare matmuls" for name in ("low_rank", "block_shuffle", "block_dense")),
    }
    # R = 16 leaves nothing out: 2 IO / 2 R (I + O) = 0.8
    assert both.cases["low_rank"]["ideal_speedup"] == pytest.approx(16 * 64 / (16 * 80))
    dense = both.cases["dense"]
    assert (dense["speedup"], dense["ideal_speedup"], dense["num_tokens"]) == (1.0, None, None)
    assert both.bars == []  # nothing is promised of a size where matmuls do not decide
    assert BenchmarkRecord(**both.__dict__).to_json()


def test_a_step_leaves_the_gradients_of_its_own_pass() -> None:
    layer = nn.Linear(5, 7)
    x, slope = torch.randn(3, 5), torch.randn(3, 7)
    run = step(layer, x, slope, "forward+backward")
    run()
    run()
    torch.testing.assert_close(layer.weight.grad, slope.t() @ x)
    layer.zero_grad()
    assert not step(layer, x, slope, "forward")().requires_grad  # type: ignore[attr-defined]


def test_bars_of_a_linear() -> None:
    both, forward = settings_of((2048, 8192))
    flops = {name: config.flops_per_token(2048, 8192) for name, config in both.configs.items()}
    times = timings(
        {
            "dense": 30.0,
            "low_rank": 10.0,
            "block_shuffle": 11.0,
            "block_dense": 10.0,
            "low_rank, bare matmuls": 9.0,
            GUIDED: 36.0,
        }
    )
    bars = {bar.name: bar for bar in kernel_bars(both, times)}
    per_flop = flops["low_rank"] / flops["block_dense"]
    assert {name: (pytest.approx(bar.value), bar.limit) for name, bar in bars.items()} == {
        "low_rank / its bare matmuls": (10 / 9, 1.03),
        "dense / low_rank": (3.0, 3.0),
        "guided (merged) / dense": (1.2, 1.10),
        "block_dense / low_rank, per FLOP, forward+backward": (per_flop, 1.05),
        "block_shuffle / low_rank, per FLOP, forward+backward": (1.1, 1.10),
    }
    assert [name for name, bar in bars.items() if not bar.at_most] == ["dense / low_rank"]
    assert [(bar.name, bar.value, bar.limit) for bar in kernel_bars(forward, times)] == [
        ("low_rank / its bare matmuls", pytest.approx(10 / 9), 1.03),
        ("block_dense / low_rank, per FLOP, forward", pytest.approx(per_flop), 1.05),
    ]


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

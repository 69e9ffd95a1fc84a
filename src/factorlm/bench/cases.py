"""What every benchmark shares: cases that take turns, ratios within a round, bars, one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from factorlm.errors import NumericError
from factorlm.measure import (
    Measurement,
    environment,
    machine_limits,
    measure_latency,
    synchronizer,
)
from factorlm.records import BarResult, BenchmarkRecord, CaseTimes


@dataclass(frozen=True, kw_only=True)
class BenchmarkCase:
    """Something to time."""

    run: Callable[[], object]
    ideal_speedup: float | None = None
    """Against the baseline, by FLOPs or bytes alone."""
    num_tokens: int | None = None
    """Tokens that a call makes or reads, where cases differ in it."""
    num_layers: int = 1
    """That a call runs one after the other; what is recorded is of one."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise about one figure: ``value`` is at most (else at least) ``limit``."""

    name: str
    value: float
    limit: float
    at_most: bool = True

    def to_result(self) -> BarResult:
        """As records hold it."""
        return BarResult(name=self.name, value=self.value, limit=self.limit, at_most=self.at_most)


@dataclass(frozen=True)
class Timings:
    """Measurements of cases that took turns."""

    by_name: Mapping[str, Measurement]

    def ms(self, name: str) -> float:
        """Median latency of ``name``."""
        return self.by_name[name].median_ms

    def ratio(self, name: str, other: str) -> float:
        """Latency of ``name`` by that of ``other``, the median of the rounds' ratios."""
        return self.by_name[name].ratio_to(self.by_name[other])

    def __contains__(self, name: object) -> bool:
        return name in self.by_name


def no_bars(timings: Timings) -> Sequence[Bar]:
    """Nothing is promised."""
    return ()


def require_close(what: str, error: float, tolerance: float) -> None:
    """Raise ``NumericError`` naming ``what`` unless ``error``, no NaN, is within ``tolerance``."""
    if not error <= tolerance:
        raise NumericError(f"{what} is off by {error:.2g}, over {tolerance:g}: nothing was timed")


def measure_cases(
    benchmark: str,
    settings: Mapping[str, Any],
    cases: Mapping[str, BenchmarkCase],
    *,
    device: torch.device,
    rounds: int,
    baseline: str = "dense",
    min_round_ms: float = 20.0,
    bars: Callable[[Timings], Sequence[Bar]] = no_bars,
) -> BenchmarkRecord:
    """Time ``cases`` alternately, ``rounds`` times, and hold the result against ``bars``."""
    found = measure_latency(
        {name: case.run for name, case in cases.items()},
        rounds=rounds,
        min_round_ms=min_round_ms,
        synchronize=synchronizer(device),
    )
    found = {name: one.divided_by(cases[name].num_layers) for name, one in found.items()}
    return record_of(benchmark, settings, cases, found, device=device, baseline=baseline, bars=bars)


def record_of(
    benchmark: str,
    settings: Mapping[str, Any],
    cases: Mapping[str, BenchmarkCase],
    found: Mapping[str, Measurement],
    *,
    device: torch.device,
    baseline: str = "dense",
    bars: Callable[[Timings], Sequence[Bar]] = no_bars,
) -> BenchmarkRecord:
    """The record of ``found``, measurements of ``cases`` that took turns."""
    timings = Timings(found)
    baseline_tokens = cases[baseline].num_tokens or 1
    return BenchmarkRecord(
        benchmark=benchmark,
        settings=dict(settings),
        environment=environment(device) | {"limits": machine_limits(device)},
        baseline=baseline,
        rounds=len(found[baseline].latencies_ms),
        cases={
            name: CaseTimes(
                median_ms=found[name].median_ms,
                spread_ms=found[name].spread_ms,
                speedup=timings.ratio(baseline, name) * (case.num_tokens or 1) / baseline_tokens,
                ideal_speedup=case.ideal_speedup,
                num_tokens=case.num_tokens,
            )
            for name, case in cases.items()
        },
        bars=[bar.to_result() for bar in bars(timings)],
    )

"""Latencies that can be compared: the cases take turns, so that what drifts meets all of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from factorlm.config import check

Case = Callable[[], object]


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until ``device`` has done what it was given; nothing on a CPU."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latencies of one case, one a round."""

    latencies_ms: tuple[float, ...]
    """Wall time of one call, by round."""
    calls_per_round: int

    @property
    def median_ms(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.latencies_ms)

    @property
    def spread_ms(self) -> float:
        """Distance between the quartiles of the rounds."""
        low, _, high = statistics.quantiles(self.latencies_ms, n=4, method="inclusive")
        return high - low

    def divided_by(self, count: int) -> Measurement:
        """Of one of the ``count`` equal things that a call did."""
        latencies = tuple(latency / count for latency in self.latencies_ms)
        return dataclasses.replace(self, latencies_ms=latencies)

    def ratio_to(self, other: Measurement) -> float:
        """Median over rounds of this latency by the other's of the same round.

        Only for cases that ``measure_latency`` was given together.
        """
        pairs = zip(self.latencies_ms, other.latencies_ms, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def measure_latency(
    cases: Mapping[str, Case],
    *,
    rounds: int = 15,
    min_round_ms: float = 20.0,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """Time ``cases`` alternately: in every round each of them once, in turning order.

    Args:
        cases: name -> function without arguments.
        rounds: at least 2.
        min_round_ms: a case is called as often in a round as it takes to fill this time.
        synchronize: waits for the device, e.g. ``torch.cuda.synchronize``.
        clock: gives seconds.

    Each case is called at least twice before the first round.
    """
    check(rounds >= 2, f"rounds={rounds} must be at least 2")

    def seconds(case: Case, calls: int) -> float:
        synchronize()
        started = clock()
        for _ in range(calls):
            case()
        synchronize()
        return clock() - started

    calls = {}
    for name, case in cases.items():
        seconds(case, 1)
        calls[name] = max(1, round(min_round_ms / 1000 / max(seconds(case, 1), 1e-9)))
    latencies: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for _ in range(rounds):
        for name in order:
            latencies[name].append(1000 * seconds(cases[name], calls[name]) / calls[name])
        order = order[1:] + order[:1]
    return {
        name: Measurement(latencies_ms=tuple(values), calls_per_round=calls[name])
        for name, values in latencies.items()
    }

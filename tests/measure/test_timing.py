from __future__ import annotations

import pytest

from factorlm.errors import ConfigError
from factorlm.measure import Measurement, measure_latency


class Machine:
    """A clock that only calls move, slower and slower, and a list of who was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowdown = 1.0
        self.called: list[str] = []

    def case(self, name: str, milliseconds: float):
        def call() -> None:
            self.called.append(name)
            self.now += self.slowdown * milliseconds / 1000

        return call


def test_cases_take_turns_and_fill_a_round() -> None:
    machine = Machine()
    found = measure_latency(
        {"fast": machine.case("fast", 2), "slow": machine.case("slow", 50)},
        rounds=3,
        min_round_ms=10,
        clock=lambda: machine.now,
    )
    assert machine.called[:4] == ["fast", "fast", "slow", "slow"]
    turns = [*["fast"] * 5, "slow", "slow", *["fast"] * 5, *["fast"] * 5, "slow"]
    assert machine.called[4:] == turns
    assert found["fast"].median_ms == pytest.approx(2)
    assert found["slow"].median_ms == pytest.approx(50)
    assert found["fast"].calls_per_round == 5
    assert found["fast"].spread_ms == pytest.approx(0)


def test_synchronize_surrounds_each_round() -> None:
    machine = Machine()
    measure_latency(
        {"a": machine.case("a", 1)},
        rounds=2,
        min_round_ms=2,
        synchronize=lambda: machine.called.append("sync"),
        clock=lambda: machine.now,
    )
    assert "".join(name[0] for name in machine.called) == "sas" * 2 + "saas" * 2


def test_statistics() -> None:
    a = Measurement(latencies_ms=(1.0, 2.0, 3.0, 4.0, 100.0), calls_per_round=1)
    b = Measurement(latencies_ms=(2.0, 4.0, 6.0, 8.0, 50.0), calls_per_round=1)
    assert a.median_ms == 3.0
    assert a.spread_ms == 2.0
    assert a.ratio_to(b) == 0.5


def test_refuses_one_round() -> None:
    with pytest.raises(ConfigError, match="rounds=1 must be at least 2"):
        measure_latency({"a": lambda: None}, rounds=1)

"""The best rate of a grid, and the line through the best rates of several sizes."""

from __future__ import annotations

import math

import pytest

from factorlm.scaling.ladder.rates import best_rate, rate_at


def bowl(rates: list[float], lowest: float) -> dict[float, float]:
    return {rate: 3.0 + 0.2 * math.log(rate / lowest) ** 2 for rate in rates}


@pytest.mark.parametrize("grid", [[1e-3, 2e-3, 4e-3, 8e-3], [8e-3, 3e-3, 1e-3, 2e-3]])
def test_a_parabola_between_the_rates(grid: list[float]) -> None:
    assert best_rate(bowl(grid, 2.5e-3)) == pytest.approx(2.5e-3, rel=1e-9)


def test_the_grids_own_best_where_no_parabola_is_seen() -> None:
    losses = bowl([1e-3, 2e-3, 4e-3], 2.5e-3)
    assert best_rate(losses | {4e-3: math.inf}) == 2e-3
    assert best_rate(bowl([1e-3, 2e-3, 4e-3], 8e-3)) == 4e-3
    assert best_rate(dict.fromkeys(losses, 3.0)) == 1e-3
    assert best_rate({2e-3: 3.0}) == 2e-3
    assert best_rate(dict.fromkeys(losses, math.inf)) is None
    assert best_rate({}) is None


def test_a_power_of_the_size() -> None:
    best = {size: 5.0 * size**-0.6 for size in (30_000, 110_000, 250_000)}
    assert rate_at(1_000_000, best) == pytest.approx(5.0 * 1e6**-0.6, rel=5e-3)
    assert rate_at(250_000, best) == pytest.approx(best[250_000], rel=5e-3)


def test_a_line_that_is_not_exact_goes_through_the_middle() -> None:
    best = {10: 1.0, 100: 4.0, 1000: 1.0}
    assert rate_at(7, best) == rate_at(5000, best) == pytest.approx(4 ** (1 / 3), rel=5e-3)


def test_one_tuned_size_has_the_rate_of_all() -> None:
    assert {rate_at(size, {100: 2.512e-3}) for size in (10, 100, 9999)} == {2.51e-3}

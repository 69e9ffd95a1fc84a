"""Held-out sizes and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from factorlm.errors import ConfigError
from factorlm.scaling import (
    bootstrap,
    compare_lines,
    fit_chinchilla,
    fit_line,
    fit_power_law,
    hold_out_largest,
    hold_out_largest_of,
)
from factorlm.scaling.fit.data import size_numbers

COMPUTE = np.repeat(np.geomspace(1e15, 1e19, 8), 3)
LOSS = 1.7 + 2.0 * (COMPUTE / 1e15) ** -0.18


def noisy(seed: int) -> np.ndarray:
    return LOSS * np.exp(np.random.default_rng(seed).normal(0, 0.005, len(LOSS)))


def test_the_right_law_predicts_the_largest_and_a_line_does_not() -> None:
    right, line = (
        hold_out_largest(fit_power_law, COMPUTE, LOSS),
        hold_out_largest(fit_line, COMPUTE, LOSS),
    )
    assert right.size == line.size == COMPUTE.max()
    assert right.measured == line.measured == pytest.approx(LOSS[-1])
    assert right.error == pytest.approx(0, abs=1e-5)
    assert line.error < -0.01
    assert line.error == pytest.approx(line.predicted / line.measured - 1)


def test_the_largest_is_left_out_with_all_its_seeds() -> None:
    """Whatever the largest size's losses are, the prediction is the same."""
    loss = noisy(0)
    changed = np.where(COMPUTE.max() == COMPUTE, 9.0, loss)
    first, second = (hold_out_largest(fit_power_law, COMPUTE, one) for one in (loss, changed))
    assert first.predicted == second.predicted
    assert second.measured == pytest.approx(9.0)


def test_seeds_of_nearly_equal_flops_are_one_size() -> None:
    """As a stochastic guide leaves them: left out together, counted together, paired as one."""
    spread = np.tile([1.0, 0.99, 1.02], 8)
    compute, loss = COMPUTE * spread, noisy(0)
    exact, near = (hold_out_largest(fit_line, one, loss) for one in (COMPUTE, compute))
    assert near.size == pytest.approx(1.02e19)
    assert near.measured == exact.measured, "all three seeds are left out"
    assert near.predicted == pytest.approx(exact.predicted, rel=1e-3)
    held = hold_out_largest_of({"a": (compute, loss), "b": (compute, loss)})
    assert held["a"].measured == exact.measured
    assert set(bootstrap(fit_line, compute, loss)) == {"slope", "intercept"}
    for fit, sizes in ((fit_line, 1), (fit_power_law, 2)):
        few = slice(3 * sizes)
        with pytest.raises(ConfigError, match=rf"compute has {sizes} sizes.*within 1\.05 times"):
            fit(compute[few], loss[few])
    split = compare_lines({"a": (COMPUTE, loss), "b": (compute, LOSS)}, "a")["b"].split
    assert split is not None
    assert abs(split.flops_part) < 1e-4


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([1.0], [0]),
        ([4.0, 1.0, 2.0, 1.04, 4.1], [2, 0, 1, 0, 2]),
        ([1.0, 1.04, 1.08, 1.12], [0, 0, 1, 1]),
    ],
)
def test_a_size_is_what_is_near_its_least_value(values: list[float], numbers: list[int]) -> None:
    assert size_numbers(np.array(values)).tolist() == numbers


def test_with_a_shared_entropy_each_family_is_without_its_largest() -> None:
    families = {"a": (COMPUTE, LOSS), "b": (COMPUTE / 2, LOSS)}
    found = hold_out_largest_of(families)
    assert [one.size for one in found.values()] == [1e19, 5e18]
    assert all(abs(one.error) < 1e-5 for one in found.values())


def test_with_chinchillas_form() -> None:
    N, D = (
        grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5))
    )
    found = hold_out_largest(fit_chinchilla, N, D, 1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28)
    assert found.size == 1e9
    assert found.error == pytest.approx(0, abs=1e-6)


def test_one_size_cannot_be_held_out() -> None:
    with pytest.raises(ConfigError, match="there is one size only"):
        hold_out_largest(fit_line, [1e18, 1e18], [3.0, 3.1])


def test_the_bootstrap_agrees_with_students_t() -> None:
    rng = np.random.default_rng(1)
    loss = 20 * COMPUTE**-0.055 * np.exp(rng.normal(0, 0.005, len(COMPUTE)))
    low, high = bootstrap(fit_line, COMPUTE, loss, num_draws=2000)["slope"]
    fit = fit_line(COMPUTE, loss)
    assert low == pytest.approx(fit.slope_low, abs=0.15 * (fit.slope_high - fit.slope_low))
    assert high == pytest.approx(fit.slope_high, abs=0.15 * (fit.slope_high - fit.slope_low))


def test_the_bootstrap_agrees_with_the_profile_likelihood() -> None:
    loss = noisy(2)
    found = bootstrap(fit_power_law, COMPUTE, loss, num_draws=150, level=0.8)
    fit = fit_power_law(COMPUTE, loss, level=0.8)
    assert list(found) == ["E", "A", "gamma"]
    for name, (low, high) in found.items():
        ends = getattr(fit, f"{name}_low"), getattr(fit, f"{name}_high")
        width = ends[1] - ends[0]
        assert low == pytest.approx(ends[0], abs=0.3 * width), name
        assert high == pytest.approx(ends[1], abs=0.3 * width), name


def test_a_seed_gives_the_same_interval() -> None:
    first, second, other = (bootstrap(fit_line, COMPUTE, noisy(3), seed=seed) for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (slice(3, None), "compute has 7 sizes; a bootstrap needs at least 8"),
        (slice(1, None), "a size has 2 seeds; a bootstrap needs at least 3"),
        (slice(0, None, 3), "a size has 1 seeds; a bootstrap needs at least 3"),
    ],
)
def test_too_few_points_are_refused(kept: slice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bootstrap(fit_line, COMPUTE[kept], LOSS[kept])


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="num_draws=10 must be at least 100"):
        bootstrap(fit_line, COMPUTE, LOSS, num_draws=10)
    with pytest.raises(ConfigError, match="a bootstrap is for fit_line and fit_power_law"):
        bootstrap(fit_chinchilla, COMPUTE, LOSS)

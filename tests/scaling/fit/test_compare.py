"""Comparing families against textbook regressions and against laws whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from factorlm.errors import ConfigError
from factorlm.scaling import (
    Comparison,
    compare_lines,
    compare_power_laws,
    fit_line,
    published_families,
    slopes_over_entropy,
    turning_entropy,
)

COMPUTE = np.repeat(np.geomspace(1e15, 1e19, 8), 3)
E = 1.7
Points = tuple[np.ndarray, np.ndarray]


def line(slope: float, loss: float, seed: int, noise: float = 0.003) -> Points:
    """``loss`` nats at 1e17 FLOPs."""
    rng = np.random.default_rng(seed)
    exact = loss * (COMPUTE / 1e17) ** slope
    return COMPUTE, exact * np.exp(rng.normal(0, noise, len(COMPUTE)))


def law(scale: float, gamma: float, seed: int, noise: float = 0.002) -> Points:
    rng = np.random.default_rng(seed)
    exact = E + scale * (COMPUTE / 1e17) ** -gamma
    return COMPUTE, exact * np.exp(rng.normal(0, noise, len(COMPUTE)))


def regression(base: Points, other: Points) -> tuple[np.ndarray, np.ndarray, int]:
    """Two lines in one regression: (a, b, Δa, Δb), their covariance, degrees of freedom."""
    x = np.log(np.concatenate([base[0], other[0]]) / 1e17)
    y = np.log(np.concatenate([base[1], other[1]]))
    is_other = np.repeat([0.0, 1.0], [len(base[0]), len(other[0])])
    design = np.stack([np.ones_like(x), x, is_other, is_other * x], axis=1)
    best, (squares,), *_ = np.linalg.lstsq(design, y, rcond=None)
    degrees = len(x) - 4
    return best, squares / degrees * np.linalg.inv(design.T @ design), degrees


@pytest.fixture(scope="module")
def two_lines() -> tuple[Points, Points, Comparison]:
    """They cross at 1e17 · (3.0 / 3.03)^(1/−0.005) = 7.3e17 FLOPs."""
    base, other = line(-0.05, 3.0, 0), line(-0.055, 3.03, 1)
    return base, other, compare_lines({"dense": base, "other": other}, "dense")["other"]


def test_slope_difference_is_that_of_the_regression(
    two_lines: tuple[Points, Points, Comparison],
) -> None:
    base, other, found = two_lines
    best, covariance, degrees = regression(base, other)
    error = math.sqrt(covariance[3, 3])
    width = scipy.stats.t.ppf(0.975, degrees) * error
    slopes = found.slopes
    assert slopes.difference == pytest.approx(best[3], rel=1e-5)
    assert slopes.low == pytest.approx(best[3] - width, rel=1e-2)
    assert slopes.high == pytest.approx(best[3] + width, rel=1e-2)
    p_value = 2 * scipy.stats.t.sf(abs(best[3] / error), degrees)
    assert slopes.p_value == pytest.approx(p_value, rel=1e-3)
    assert slopes.is_steeper


def test_crossing_has_fiellers_interval(two_lines: tuple[Points, Points, Comparison]) -> None:
    """Places x where Δa + Δb x is within t standard errors of 0: a quadratic in x."""
    base, other, found = two_lines
    best, covariance, degrees = regression(base, other)
    t2 = scipy.stats.t.ppf(0.975, degrees) ** 2
    polynomial = [
        best[3] ** 2 - t2 * covariance[3, 3],
        2 * (best[2] * best[3] - t2 * covariance[2, 3]),
        best[2] ** 2 - t2 * covariance[2, 2],
    ]
    low, high = sorted(1e17 * np.exp(np.roots(polynomial)))
    crossing = found.crossing
    assert crossing.is_within
    assert crossing.compute == pytest.approx(1e17 * math.exp(-best[2] / best[3]), rel=1e-3)
    assert crossing.compute_low == pytest.approx(low, rel=0.01)
    assert crossing.compute_high == pytest.approx(min(high, crossing.data_high), rel=0.01)
    assert str(crossing).startswith(f"crossing at {crossing.compute:.3g} FLOPs (95 %: ")


def test_multipliers_say_what_equal_loss_costs(
    two_lines: tuple[Points, Points, Comparison],
) -> None:
    base, other, found = two_lines
    best, _, _ = regression(base, other)
    for one in found.multipliers:
        base_log = (math.log(one.loss) - best[0]) / best[1]
        other_log = (math.log(one.loss) - best[0] - best[2]) / (best[1] + best[3])
        assert one.base_flops == pytest.approx(1e17 * math.exp(base_log), rel=1e-3)
        assert one.multiplier == pytest.approx(math.exp(base_log - other_log), rel=1e-3)
        assert one.multiplier_low < one.multiplier < one.multiplier_high
    assert [one.loss for one in found.multipliers] == sorted(
        (one.loss for one in found.multipliers), reverse=True
    )


def test_split_adds_up_and_finds_a_constant_gap(
    two_lines: tuple[Points, Points, Comparison],
) -> None:
    """Balanced seeds: the parts sum to the difference. At equal FLOPs none comes from FLOPs."""
    split = two_lines[2].split
    assert split is not None
    assert split.total == pytest.approx(two_lines[2].slopes.difference, rel=1e-5)
    assert split.flops_part + split.gap_part == pytest.approx(split.total)
    assert split.flops_part == pytest.approx(0, abs=1e-12)


def test_a_growing_saving_alone_makes_a_curve_steeper() -> None:
    """The base's very losses, at FLOPs that are a share falling with size."""
    dense = line(-0.05, 3.0, 2, noise=0.0)
    found = compare_lines({"dense": dense, "cheap": cheaper(dense)}, "dense")["cheap"]
    assert found.split is not None
    assert found.split.flops_part == pytest.approx(-0.05 / 0.96 + 0.05, rel=1e-6)
    assert found.split.gap_part == pytest.approx(0, abs=1e-12)


def with_seeds(family: Points, seeds: list[int]) -> Points:
    """Of eight sizes with three seeds each, fewer."""
    kept = np.concatenate([3 * size + np.arange(count) for size, count in enumerate(seeds)])
    return family[0][kept], family[1][kept]


def cheaper(family: Points) -> Points:
    """At FLOPs that are a share falling with size."""
    return family[0] * (family[0] / 1e15) ** -0.04, family[1]


def test_split_adds_up_with_fewer_seeds_of_a_size() -> None:
    """As many in both families: against regressions over the runs themselves."""
    seeds = [3, 3, 3, 2, 3, 3, 3, 1]
    base = with_seeds(line(-0.05, 3.0, 0), seeds)
    other = with_seeds(cheaper(line(-0.055, 3.03, 1)), seeds)
    found = compare_lines({"dense": base, "other": other}, "dense")["other"]
    split = found.split
    assert split is not None
    assert split.total == pytest.approx(found.slopes.difference, rel=1e-5)
    assert split.flops_part + split.gap_part == pytest.approx(split.total)
    base_slope, moved_slope = (
        scipy.stats.linregress(np.log(compute), np.log(base[1])).slope
        for compute in (base[0], other[0])
    )
    assert split.flops_part == pytest.approx(moved_slope - base_slope, rel=1e-9)
    assert abs(split.flops_part) > 1e-3


def test_gaps_are_weighed_by_their_seeds() -> None:
    """Against the weighted normal equations; a gap's variance is that of a run · (1/m + 1/n)."""
    seeds, others = np.array([3, 3, 3, 3, 3, 3, 2, 1]), np.array([3, 3, 1, 3, 3, 3, 3, 3])
    base = with_seeds(line(-0.05, 3.0, 0), list(seeds))
    other = with_seeds(line(-0.055, 3.03, 1), list(others))
    found = compare_lines({"dense": base, "other": other}, "dense", level=0.9)["other"]
    split = found.split
    assert split is not None
    gaps = [
        np.log(other[1][other[0] == compute]).mean() - np.log(base[1][base[0] == compute]).mean()
        for compute in np.unique(base[0])
    ]
    root = 1 / np.sqrt(1 / seeds + 1 / others)
    design = root[:, None] * np.stack([np.ones(8), np.log(np.unique(base[0]) / 1e17)], axis=1)
    best, (squares,), *_ = np.linalg.lstsq(design, root * gaps, rcond=None)
    error = math.sqrt(squares / 6 * np.linalg.inv(design.T @ design)[1, 1])
    width = scipy.stats.t.ppf(0.95, 6) * error
    assert split.gap_part == pytest.approx(best[1], rel=1e-6)
    assert split.gap_part_low == pytest.approx(best[1] - width, rel=1e-6)
    assert split.gap_part_high == pytest.approx(best[1] + width, rel=1e-6)
    p_value = 2 * scipy.stats.t.sf(abs(best[1] / error), 6)
    assert split.gap_p_value == pytest.approx(p_value, rel=1e-6)
    assert split.flops_part == pytest.approx(0, abs=1e-12), "the same FLOPs"
    assert split.total == pytest.approx(split.gap_part)
    assert split.total != pytest.approx(found.slopes.difference, rel=1e-3)


def test_no_split_without_pairs_of_sizes() -> None:
    base, other = line(-0.05, 3.0, 0), line(-0.055, 3.03, 1)
    fewer = tuple(column[:-3] for column in other)
    assert compare_lines({"dense": base, "other": fewer}, "dense")["other"].split is None


@pytest.fixture(scope="module")
def two_laws() -> tuple[dict[str, Points], Comparison]:
    """They cross at 1e17 · 1.1^(1/0.04) = 1.08e18 FLOPs."""
    families = {"dense": law(1.0, 0.16, 3), "other": law(1.1, 0.20, 4)}
    return families, compare_power_laws(families, "dense", level=0.99)["other"]


def test_laws_with_a_shared_entropy(two_laws: tuple[dict[str, Points], Comparison]) -> None:
    found = two_laws[1]
    slopes = found.slopes
    truth = -0.04 * (1 - E / slopes.loss)
    assert slopes.low <= truth <= slopes.high < 0
    assert slopes.is_steeper
    assert slopes.p_value < 0.01
    assert found.crossing.compute_low <= 1e17 * 1.1**25 <= found.crossing.compute_high
    for one in found.multipliers:
        base = 1e17 * (one.loss - E) ** (-1 / 0.16)
        other = 1e17 * ((one.loss - E) / 1.1) ** (-1 / 0.20)
        assert one.multiplier_low <= base / other <= one.multiplier_high
    assert found.split is None


def test_equal_families_do_not_differ() -> None:
    families = {"dense": law(1.0, 0.16, 5), "twin": law(1.0, 0.16, 6)}
    slopes = compare_power_laws(families, "dense", level=0.99)["twin"].slopes
    assert slopes.is_steeper is None
    assert slopes.p_value > 0.01


def test_p_values_of_equal_families_are_uniform() -> None:
    """Without a difference p is below 0.2 in a fifth of the draws: 20 of 100, give or take 3 σ."""
    small = 0
    for seed in range(100):
        families = {"a": line(-0.05, 3.0, 2 * seed), "b": line(-0.05, 3.0, 2 * seed + 1)}
        (slopes,) = slopes_over_entropy(families, "a", [0.0])["b"]
        small += slopes.p_value < 0.2
    assert 8 <= small <= 32


def test_parallel_curves_do_not_cross() -> None:
    families = {"dense": line(-0.05, 3.0, 7), "worse": line(-0.05, 3.3, 8)}
    crossing = compare_lines(families, "dense")["worse"].crossing
    assert not crossing.is_within
    assert math.isnan(crossing.compute_low)
    assert str(crossing) == "no crossing within the data, 1e+15 to 1e+19 FLOPs"


def test_the_order_of_slopes_turns_with_entropy() -> None:
    """Published points: low_rank 32 % is steeper below, flatter above, and nobody knows."""
    families = published_families()
    turning = turning_entropy(families, "dense", "low_rank 32 %")
    assert turning == pytest.approx(1.67, abs=0.01)
    around = slopes_over_entropy(families, "dense", [turning - 0.05, turning + 0.05])
    before, after = around["low_rank 32 %"]
    assert before.difference < 0 < after.difference
    assert before.is_steeper is after.is_steeper is None


def test_an_order_that_never_turns() -> None:
    families = {"dense": law(1.0, 0.10, 9, 0.0), "other": law(1.0, 0.3, 9, 0.0)}
    assert math.isnan(turning_entropy(families, "dense", "other"))


@pytest.mark.parametrize(
    ("families", "base", "message"),
    [
        ({"dense": line(-0.05, 3, 0), "b": line(-0.05, 3, 1)}, "dens", "Did you mean 'dense'?"),
        ({"dense": line(-0.05, 3, 0)}, "dense", "only 'dense' is there"),
        ({"dense": line(-0.05, 3, 0), "b": ([1.0], [2.0])}, "dense", "compute of b has 1 sizes"),
    ],
)
def test_refusals(families: dict, base: str, message: str) -> None:
    for compare in (compare_lines, compare_power_laws):
        with pytest.raises(ConfigError, match=message):
            compare(families, base)


def test_a_line_that_rises_differs_by_all_of_its_slope() -> None:
    compute = np.geomspace(1e10, 1e16, 4)
    families = {
        "falling": (compute, 9.0 * (compute / 1e10) ** -0.02),
        "rising": (compute, 3.0 * (compute / 1e10) ** 0.01 * np.array([1.0, 1.01, 1.0, 1.01])),
    }
    found = compare_lines(families, "falling")["rising"]
    slopes = {name: fit_line(*points).slope for name, points in families.items()}
    assert slopes["rising"] > 0.01
    assert found.slopes.difference == pytest.approx(slopes["rising"] - slopes["falling"], abs=1e-6)
    assert found.slopes.is_steeper is False
    assert found.multipliers == ()
    assert "no crossing within the data" in str(found.crossing)


def test_equal_losses_say_nothing_of_slopes() -> None:
    points = np.geomspace(1e11, 1e15, 5), np.full(5, 3.0)
    families = {"dense": points, "other": points}
    assert compare_lines(families, "dense")["other"].slopes.is_steeper is None
    assert compare_power_laws(families, "dense")["other"].slopes.is_steeper is None

"""The seeded permutation: a bijection for every size, uniform enough, fixed for ever."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from factorlm.data.permutation import hash_key, permute


@pytest.mark.parametrize("n", [*range(1, 70), 99, 100, 101, 1023, 1024, 1025, 30_031])
def test_a_bijection(n):
    for key in ((0,), (1, 2), (2**63, 5)):
        values = permute(np.arange(n), n, *key)
        assert values.dtype == np.int64
        assert sorted(values.tolist()) == list(range(n))


def test_any_part_is_that_part_of_the_whole():
    whole = permute(np.arange(1000), 1000, 7)
    places = np.array([[3, 999], [0, 3]])
    assert (permute(places, 1000, 7) == whole[places]).all()
    assert permute(np.arange(0), 1000, 7).shape == (0,)


def test_large_ranges_cost_no_memory():
    n = 10**15
    values = permute(np.arange(n - 1000, n), n, 3)
    assert len(set(values.tolist())) == 1000
    assert values.min() >= 0
    assert values.max() < n


@pytest.mark.parametrize("n", [2, 3, 5, 7, 12])
def test_every_value_is_as_likely_at_every_place(n):
    seeds = 4000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_neighbours_and_keys_are_not_related():
    n = 20_000
    first, second = permute(np.arange(n), n, 0, 1), permute(np.arange(n), n, 0, 2)
    assert abs(stats.pearsonr(first, np.arange(n)).statistic) < 0.03
    assert abs(stats.pearsonr(first[:-1], first[1:]).statistic) < 0.03
    assert abs(stats.pearsonr(first, second).statistic) < 0.03
    assert (first == second).sum() < 10
    steps = np.diff(first) % n
    assert stats.kstest(steps / n, "uniform").pvalue > 1e-4


def test_the_order_is_part_of_the_format():
    """A change here changes the data order of every run: never edit these numbers."""
    assert permute(np.arange(10), 10, 0).tolist() == [6, 8, 0, 5, 7, 1, 9, 2, 4, 3]
    assert permute(np.arange(5), 10**12, 1, 2, 3).tolist() == [
        399506134543,
        80245850447,
        18115501773,
        825695279852,
        894091383976,
    ]
    assert hash_key(1, 2, 3) == 7702586659592502839

"""The training stream: each token once an epoch, equal for any world size, read at any step."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest

from factorlm.data import TokenLoader
from factorlm.errors import ConfigError, DataError


def numbers(first, count):
    """Text whose every position can be told apart: fixed-width numbers."""
    return "".join(f"{number:05d}" for number in range(first, first + count))


@pytest.fixture
def dataset(prepared):
    return prepared({"a": numbers(0, 1000)}, shard_tokens=700)


@pytest.fixture
def mixture(prepared):
    texts = {"a": numbers(0, 800), "b": numbers(20_000, 500), "c": numbers(50_000, 300)}
    return prepared(texts, weights=(1.0, 0.5, 2.25))


def loader_of(dataset, **options):
    defaults = {"context_length": 16, "sequences_per_step": 6, "seed": 3}
    return TokenLoader(dataset, **defaults | options)


def test_block_k_is_ids_from_k_l_to_k_l_plus_l(dataset, all_ids):
    whole = all_ids(dataset.split("train")).astype(np.int64)
    loader = loader_of(dataset)
    for step in (0, 1, 50, 51, 52, 1000):
        blocks, batch = loader.batch_ids(step), loader.batch(step)
        assert batch.dtype == np.int64
        assert batch.shape == (6, 17)
        for block, row in zip(blocks, batch, strict=True):
            assert (row == whole[block * 16 : block * 16 + 17]).all()


def test_every_token_is_predicted_once_an_epoch(dataset):
    loader = loader_of(dataset, sequences_per_step=1)
    num_blocks = 5000 // 16
    assert loader.blocks_per_epoch == num_blocks
    for epoch in range(3):
        steps = range(epoch * num_blocks, (epoch + 1) * num_blocks)
        blocks = [loader.batch_ids(step)[0] for step in steps]
        assert sorted(blocks) == list(range(num_blocks))
        assert blocks != sorted(blocks)
        assert loader.epoch(steps[-1] + 1) == epoch + 1


def test_epochs_and_seeds_differ(dataset):
    def first_blocks(seed, epoch):
        loader = loader_of(
            dataset, sequences_per_step=loader_of(dataset).blocks_per_epoch, seed=seed
        )
        return tuple(loader.batch_ids(epoch).tolist())

    assert len({first_blocks(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert first_blocks(0, 1) == first_blocks(0, 1)


def test_a_batch_may_cross_the_end_of_an_epoch(dataset):
    one = loader_of(dataset, sequences_per_step=1)
    many = loader_of(dataset, sequences_per_step=100)
    blocks = np.concatenate([many.batch_ids(step) for step in range(10)])
    assert blocks.tolist() == [one.batch_ids(step)[0] for step in range(1000)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_stream_is_the_same_for_any_world_size(mixture, world_size):
    whole = loader_of(mixture, sequences_per_step=8)
    ranks = [
        loader_of(mixture, sequences_per_step=8, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 1, 2, 77, 100_000):
        parts = [rank.batch(step) for rank in ranks]
        assert all(len(part) == 8 // world_size for part in parts)
        assert (np.concatenate(parts) == whole.batch(step)).all()


def test_a_resumed_stream_is_the_undisturbed_one(mixture):
    steps = [*range(40), 683, 682, 100_000, 3, 39, 2_000]
    undisturbed = loader_of(mixture)
    expected = {step: undisturbed.batch(step) for step in sorted(steps)}
    for step in steps:
        assert (loader_of(mixture).batch(step) == expected[step]).all()
    walker = loader_of(mixture)
    for step in steps:
        assert (walker.batch(step) == expected[step]).all()


@pytest.mark.parametrize("step", [0, 10, 1_000, 100_000, 10**12])
def test_any_step_reads_its_batch_and_nothing_else(mixture, monkeypatch, step):
    read = []
    preadv = os.preadv

    def counting(descriptor, buffers, offset):
        read.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    loader_of(mixture).batch(step)
    assert read == [17 * 2] * 6


def test_mixtures_are_exact_over_every_epoch(mixture, all_ids):
    num_blocks = [4000 // 16, 2500 // 16, 1500 // 16]
    taken = [250, 78, round(2.25 * 93)]
    loader = loader_of(mixture, sequences_per_step=sum(taken))
    assert loader.blocks_per_epoch == sum(taken)
    starts = np.cumsum([0, *num_blocks])
    seen = [Counter() for _ in taken]
    for epoch in range(1, 9):
        blocks = loader.batch_ids(epoch - 1)
        sources = np.searchsorted(starts, blocks, side="right") - 1
        assert np.bincount(sources).tolist() == taken
        for source, block in zip(sources.tolist(), blocks.tolist(), strict=True):
            seen[source][block - starts[source]] += 1
        assert set(seen[0].values()) == {epoch}
        for counter, blocks_there, share in zip(seen, num_blocks, taken, strict=True):
            counts = [counter[block] for block in range(blocks_there)]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == share * epoch
    assert len(seen[1]) == num_blocks[1]


def test_the_sources_of_a_mixture_are_well_mixed(mixture):
    loader = loader_of(mixture, sequences_per_step=1)
    firsts = [loader.batch_ids(step)[0] < 250 for step in range(loader.blocks_per_epoch)]
    thirds = [sum(part) / len(part) for part in np.array_split(firsts, 3)]
    assert max(thirds) - min(thirds) < 0.2


def test_ids_are_those_of_their_source(mixture):
    loader = loader_of(mixture, sequences_per_step=60)
    starts = np.cumsum([0, 250, 156])
    for block, row in zip(loader.batch_ids(0), loader.batch(0), strict=True):
        source = np.searchsorted(starts, block, side="right") - 1
        (stream,) = mixture.split("train").streams[source : source + 1]
        expected = stream.read((block - starts[source]) * 16, 17)
        assert (row == expected).all()


def test_changing_the_returned_ids_changes_nothing(dataset):
    loader = loader_of(dataset)
    expected = loader.batch_ids(0).copy()
    loader.batch_ids(0)[:] = 0
    assert (loader.batch_ids(0) == expected).all()


def test_less_than_a_block_is_refused_with_the_sizes(prepared):
    dataset = prepared({"a": "x" * 300, "short": "y" * 63})
    message = r"short.txt' has 64 tokens in split 'train'; one block of context_length=64 needs 65"
    with pytest.raises(DataError, match=message):
        loader_of(dataset, context_length=64)
    assert loader_of(dataset, context_length=63).blocks_per_epoch == 300 // 63 + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 0}, "context_length=0 must be >= 1"),
        ({"sequences_per_step": 0}, "sequences_per_step=0 must be a positive multiple"),
        ({"world_size": 4}, "sequences_per_step=6 must be a positive multiple of world_size=4"),
        ({"rank": 1}, r"rank=1 must be in \[0, world_size=1\)"),
    ],
)
def test_wrong_sizes_are_refused(dataset, change, message):
    with pytest.raises(ConfigError, match=message):
        loader_of(dataset, **change)
    with pytest.raises(ConfigError, match="step=-1"):
        loader_of(dataset).batch_ids(-1)


def test_the_order_is_part_of_the_format(mixture):
    """A change here changes the data order of every run: never edit these numbers."""
    assert loader_of(mixture).batch_ids(0).tolist() == [60, 76, 56, 472, 71, 10]
    assert loader_of(mixture).batch_ids(100_000).tolist() == [414, 87, 123, 445, 461, 409]

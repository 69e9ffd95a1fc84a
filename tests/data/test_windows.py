"""Evaluation windows: every token a target once, the last partial window included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorlm.data import EvalWindows
from factorlm.data.windows import IGNORED
from factorlm.errors import ConfigError, DataError


def targets_of(windows):
    rows = np.concatenate([batch.targets.ravel() for batch in windows])
    return rows[rows != IGNORED].tolist()


@pytest.mark.parametrize("context_length", [1, 7, 16, 99, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_but_the_first_is_a_target_once(prepared, all_ids, context_length, batch_size):
    text = "".join(map(chr, range(32, 122))) * 3
    dataset = prepared({"a": text}, shard_tokens=50)
    windows = EvalWindows(dataset, "train", context_length=context_length, batch_size=batch_size)
    whole = all_ids(dataset.split("train")).tolist()
    assert targets_of(windows) == whole[1:]
    assert windows.num_targets == len(whole) - 1 == 270
    assert windows.num_text_bytes == 270
    assert windows.num_windows == -(-270 // context_length)
    batches = list(windows)
    assert len(batches) == len(windows) == -(-windows.num_windows // batch_size)
    assert sum(batch.num_targets for batch in batches) == 270
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape
        assert batch.inputs.shape[1] == context_length
        padded = batch.targets == IGNORED
        assert (batch.inputs[padded] == 256).all()
        follows = ~padded[:, 1:]
        assert (batch.inputs[:, 1:][follows] == batch.targets[:, :-1][follows]).all()


def test_windows_do_not_cross_sources(prepared):
    dataset = prepared({"a": "a" * 20, "b": "b" * 20})
    windows = EvalWindows(dataset, "train", context_length=8, batch_size=3)
    text = [ord("a")] * 19 + [256] + [ord("b")] * 19 + [256]
    assert targets_of(windows) == text
    assert windows.num_targets == 40
    for batch in windows:
        for row, targets in zip(batch.inputs, batch.targets, strict=True):
            assert len(set(row[targets != IGNORED].tolist())) == 1


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_windows_in_equal_numbers_of_batches(prepared, world_size):
    dataset = prepared({"a": "".join(map(chr, range(32, 122)))})
    options = {"context_length": 8, "batch_size": 2, "world_size": world_size}
    ranks = [EvalWindows(dataset, "train", rank=rank, **options) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    targets = sorted(token for rank in ranks for token in targets_of(rank))
    assert targets == [*range(33, 122), 256]
    assert len({rank.num_targets for rank in ranks}) == 1
    for rank in ranks:
        assert len(list(rank)) == len(rank)


def test_bits_per_byte_of_a_known_model(prepared):
    """A model that gives each of the 257 ids the same chance costs log2(257) bits a target."""
    dataset = prepared({"a": "x" * 100})
    windows = EvalWindows(dataset, "train", context_length=16, batch_size=4)
    nats = 0.0
    for batch in windows:
        logits = torch.zeros(batch.targets.size, 257, dtype=torch.float64)
        targets = torch.from_numpy(batch.targets.ravel())
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    bits_per_byte = nats / np.log(2) / windows.num_text_bytes
    assert bits_per_byte == pytest.approx(np.log2(257), rel=1e-12)


def test_nothing_to_predict_and_wrong_sizes_are_refused(prepared):
    dataset = prepared({"a": "x"})
    assert EvalWindows(dataset, "train", context_length=8, batch_size=1).num_targets == 1
    with pytest.raises(DataError, match="split 'validation' has no token to predict"):
        EvalWindows(dataset, context_length=8, batch_size=1)
    for wrong in ({"context_length": 0}, {"batch_size": 0}, {"rank": 1}):
        with pytest.raises(ConfigError):
            EvalWindows(dataset, "train", **{"context_length": 8, "batch_size": 1} | wrong)

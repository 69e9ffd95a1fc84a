"""Shards: the right width, no id that wraps, and going on after the last durable byte."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from factorlm.data.shards import StreamState, StreamWriter, to_token_dtype, token_dtype
from factorlm.errors import DataError
from factorlm.storage import describe_file


@pytest.fixture
def root(tmp_path):
    (tmp_path / "shards").mkdir()
    return tmp_path


def content(root, dtype="<u2"):
    data = b"".join(path.read_bytes() for path in sorted((root / "shards").iterdir()))
    return np.frombuffer(data, dtype).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "<u2"), (256, "<u2"), (65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")],
)
def test_the_narrowest_width_without_wrapping(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    ids = np.random.default_rng(0).integers(0, vocab_size, 10**6)
    ids[:2] = 0, vocab_size - 1
    assert (to_token_dtype(ids, vocab_size) == ids).all()
    for wrong in (-1, vocab_size, 2**16 + vocab_size, 2**31, 2**32, 2**32 + 1):
        with pytest.raises(DataError, match=rf"token id {wrong} is outside .* {vocab_size:,} ids"):
            to_token_dtype(np.array([0, wrong]), vocab_size)


def test_ids_fill_shards_of_one_size(root):
    writer = StreamWriter(root, "train-00", 300, 4, StreamState())
    finished = [writer.append(np.arange(start, stop)) for start, stop in ((0, 3), (3, 5), (5, 14))]
    writer.append(np.arange(0))
    writer.close()
    writer.close()
    assert finished == [False, True, True]
    assert content(root) == list(range(14))
    names = [f"shards/train-00-{number:05d}.bin" for number in range(4)]
    assert list(writer.state.closed) == names
    assert [entry.size for entry in writer.state.closed.values()] == [8, 8, 8, 4]
    assert all(describe_file(root / name) == entry for name, entry in writer.state.closed.items())
    assert (writer.state.num_tokens, writer.state.open_tokens) == (14, 0)


def test_a_full_last_shard_leaves_no_empty_one(root):
    writer = StreamWriter(root, "a", 300, 4, StreamState())
    writer.append(np.arange(8))
    writer.close()
    assert len(list((root / "shards").iterdir())) == 2


def test_writing_goes_on_after_the_durable_ids(root):
    writer = StreamWriter(root, "a", 300, 100, StreamState())
    writer.append(np.arange(10))
    writer.sync()
    state = StreamState(open_tokens=10, num_tokens=10)
    writer.append(np.arange(90, 95))
    writer.abandon()
    writer = StreamWriter(root, "a", 300, 100, state)
    writer.append(np.arange(10, 20))
    writer.close()
    assert content(root) == list(range(20))
    (entry,) = writer.state.closed.values()
    expected = np.arange(20, dtype="<u2").tobytes()
    assert (entry.size, entry.xxh3_128) == (40, xxhash.xxh3_128_hexdigest(expected))


def test_lost_ids_are_noticed(root):
    (root / "shards" / "a-00000.bin").write_bytes(b"1234567")
    with pytest.raises(DataError, match=r"a-00000\.bin: shorter than the 8 bytes"):
        StreamWriter(root, "a", 300, 100, StreamState(open_tokens=4))
    with pytest.raises(DataError, match=r"b-00000\.bin: shorter"):
        StreamWriter(root, "b", 300, 100, StreamState(open_tokens=4))

"""Token datasets: every kind of damage is noticed and named; any range is read exactly."""

from __future__ import annotations

import contextlib
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorlm.data import dataset as dataset_module
from factorlm.data import open_dataset
from factorlm.errors import DataError
from factorlm.storage import read_manifest, write_manifest, write_sealed_json
from factorlm.testing.faults import flip_bit


@pytest.fixture
def dataset(prepared):
    texts = {"a": "first source, " * 40, "b": "the second one " * 30}
    return prepared(texts, shard_tokens=100, val_fraction=0.2)


def rewrite(dataset, change):
    """Another whole manifest."""
    manifest = read_manifest(dataset.path)
    change(manifest.extra)
    write_manifest(dataset.path, manifest.extra, manifest.files)


def test_facts(dataset, tmp_path):
    assert (dataset.vocab_size, dataset.eos_id, dataset.dtype) == (257, 256, np.dtype("<u2"))
    train, validation = dataset.split("train"), dataset.split("validation")
    assert [stream.num_tokens for stream in train.streams] == [448, 360]
    assert [stream.num_tokens for stream in validation.streams] == [113, 91]
    assert (train.num_tokens, train.num_documents, train.num_text_bytes) == (808, 2, 808)
    assert (validation.num_tokens, validation.num_text_bytes) == (204, 202)
    assert (train.num_shards, validation.num_shards) == (5 + 4, 2 + 1)
    assert dataset.load_tokenizer().eos_id == 256
    assert dataset.tokenizer_folder == tmp_path / "data" / "tokenizer"
    with pytest.raises(DataError, match="no split 'valid'; it has train, validation"):
        dataset.split("valid")


def test_any_range_is_read_across_shards(dataset):
    stream = dataset.split("train").streams[0]
    whole = b"first source, " * 32
    assert stream.read(0, 448).astype(np.uint8).tobytes() == whole
    for start in range(0, 448, 7):
        for count in (0, 1, 99, 100, 101, 250):
            if start + count <= 448:
                ids = stream.read(start, count)
                assert ids.astype(np.uint8).tobytes() == whole[start : start + count]


def test_few_shards_are_open_at_once(dataset, monkeypatch):
    monkeypatch.setattr(dataset_module, "MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("train", "validation", "train"):
        for stream in dataset.split(name).streams:
            stream.read(0, stream.num_tokens)
            assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_flipped_bits_are_noticed_by_verify(dataset):
    dataset.verify()
    generator = random.Random(0)
    paths = [path for path in sorted(dataset.path.rglob("*")) if path.is_file()]
    paths = [path for path in paths if path.name != ".lock"]
    for _ in range(300):
        path = generator.choice(paths)
        data = path.read_bytes()
        flip_bit(path, generator.randrange(8 * len(data)))
        with pytest.raises(DataError, match=path.name):
            open_dataset(dataset.path).verify()
        path.write_bytes(data)
    open_dataset(dataset.path).verify()


def test_cuts_are_noticed_at_opening(dataset):
    for path in sorted(dataset.path.rglob("*")):
        if path.is_file() and path.name != ".lock":
            data = path.read_bytes()
            for size in {0, 1, len(data) // 2, len(data) - 2, len(data) - 1}:
                path.write_bytes(data[:size])
                with pytest.raises(DataError, match=path.name):
                    open_dataset(dataset.path)
            path.write_bytes(data)
    open_dataset(dataset.path)


def test_a_shard_that_is_cut_while_it_is_read_is_named_with_its_offset(dataset):
    stream = dataset.split("train").streams[0]
    stream.read(0, 448)
    os.truncate(dataset.path / stream.shards[1], 120)
    assert len(stream.read(100, 60)) == 60
    with pytest.raises(DataError, match=r"train-00-00001\.bin: cut short, it ends at byte 120"):
        stream.read(100, 61)


def test_a_shard_that_goes_away_is_named(dataset):
    stream = dataset.split("train").streams[0]
    (dataset.path / stream.shards[2]).unlink()
    with pytest.raises(DataError, match=r"train-00-00002\.bin: cannot be read"):
        stream.read(200, 10)


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        open_dataset(tmp_path / "missing")
    write_manifest(tmp_path, {"step": 3})
    with pytest.raises(DataError, match=r"not of token shards \(KeyError: 'kind'\)"):
        open_dataset(tmp_path)
    write_manifest(tmp_path, {"kind": "checkpoint"})
    with pytest.raises(DataError, match="kind is 'checkpoint'"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda extra: extra.pop("vocab_size"),
        lambda extra: extra.update(vocab_size="257"),
        lambda extra: extra.update(splits=[]),
        lambda extra: extra["splits"]["train"][0].pop("shards"),
        lambda extra: extra["splits"]["train"][0].update(source=9),
        lambda extra: extra["splits"]["train"][0].update(shards=["shards/other.bin"]),
        lambda extra: extra["splits"]["train"][0].update(shards=[["x"]]),
        lambda extra: extra["splits"]["train"][0].update(num_tokens=447),
        lambda extra: extra["splits"].update(train=None),
        lambda extra: extra.update(sources=None),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(dataset, change):
    rewrite(dataset, change)
    with pytest.raises(DataError, match="manifest"):
        open_dataset(dataset.path)


def test_another_tokenizer_is_noticed(dataset):
    rewrite(dataset, lambda extra: extra.update(tokenizer_fingerprint="0" * 64))
    with pytest.raises(DataError, match="not the tokenizer that made these shards"):
        open_dataset(dataset.path).load_tokenizer()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("kind", "vocab_size", "eos_id", "tokenizer_fingerprint", "sources", "splits", "train")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1),
    body=st.one_of(st.none(), st.dictionaries(st.sampled_from(("files", "extra")), JSON)),
)
def test_any_sealed_manifest_is_opened_or_refused(tmp_path_factory, changes, body):
    """Only ``DataError``, whatever plain JSON a manifest holds."""
    folder = tmp_path_factory.mktemp("junk")
    extra = {"kind": dataset_module.KIND, "vocab_size": 3, "sources": [], "splits": {}}
    whole = {"format_version": 1, "files": {}, "extra": extra | changes}
    write_sealed_json(folder / "manifest.json", whole | (body or {}))
    with contextlib.suppress(DataError):
        open_dataset(folder)

"""Manifests: any flipped bit, cut, missing or swapped file is noticed and named."""

from __future__ import annotations

import json
import os
import random

import pytest
import xxhash

from factorlm.errors import CheckpointError, DataError
from factorlm.storage import (
    MANIFEST_FILE,
    describe_file,
    read_manifest,
    read_sealed_json,
    verify,
    write_manifest,
    write_sealed_json,
)
from factorlm.testing.faults import flip_bit


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step-1"
    (folder / "optim").mkdir(parents=True)
    generator = random.Random(0)
    for name in ("weights.bin", "optim/state.bin"):
        (folder / name).write_bytes(generator.randbytes(3000))
    (folder / "empty").write_bytes(b"")
    (folder / ".lock").write_text("left out")
    write_manifest(folder, {"step": 1, "rate": 1e5, "näme": "é", "nested": {"b": [1, None]}})
    return folder


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]


def reseal(folder, change):
    """A manifest that is whole but wrong, as an attacker could write it."""
    body = read_sealed_json(folder / MANIFEST_FILE)
    change(body)
    write_sealed_json(folder / MANIFEST_FILE, body)


def test_round_trip(folder):
    manifest = verify(folder)
    assert list(manifest.files) == ["empty", "optim/state.bin", "weights.bin"]
    assert manifest.extra == {"step": 1, "rate": 1e5, "näme": "é", "nested": {"b": [1, None]}}
    data = (folder / "weights.bin").read_bytes()
    assert manifest.files["weights.bin"].size == len(data)
    assert manifest.files["weights.bin"].xxh3_128 == xxhash.xxh3_128_hexdigest(data)
    assert describe_file(folder / "weights.bin") == manifest.files["weights.bin"]


def test_the_same_content_gives_the_same_manifest(folder):
    first = (folder / MANIFEST_FILE).read_bytes()
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.extra, dict(reversed(manifest.files.items())))
    assert (folder / MANIFEST_FILE).read_bytes() == first


def test_flipped_bits_are_noticed(folder):
    generator = random.Random(1)
    paths = [path for path in files(folder) if path.stat().st_size]
    for _ in range(300):
        path = generator.choice(paths)
        data = path.read_bytes()
        flip_bit(path, generator.randrange(8 * len(data)))
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder, CheckpointError)
        path.write_bytes(data)
    verify(folder)


def test_flipped_bits_of_the_manifest_are_noticed_at_opening(folder):
    path = folder / MANIFEST_FILE
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=MANIFEST_FILE):
            read_manifest(folder)


def test_every_cut_and_every_longer_file_is_noticed_at_opening(folder):
    for path in files(folder):
        data = path.read_bytes()
        for size in {0, 1, len(data) // 2, len(data) - 1, len(data) + 1} - {len(data), -1}:
            path.write_bytes((data + b"\n")[:size])
            with pytest.raises(DataError, match=path.name):
                read_manifest(folder)
        path.write_bytes(data)


def test_missing_swapped_linked_and_strange_files_are_noticed(folder):
    weights, state = folder / "weights.bin", folder / "optim" / "state.bin"
    data = weights.read_bytes()
    weights.write_bytes(state.read_bytes())
    read_manifest(folder)
    with pytest.raises(DataError, match=r"weights\.bin: damaged"):
        verify(folder)
    weights.unlink()
    with pytest.raises(DataError, match=r"weights\.bin: No such file"):
        read_manifest(folder)
    weights.symlink_to(state)
    with pytest.raises(DataError, match=r"weights\.bin is a symbolic link"):
        read_manifest(folder)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(DataError, match=r"weights\.bin is not a plain file"):
        read_manifest(folder)
    weights.rmdir()
    weights.write_bytes(data)
    verify(folder)


def test_a_linked_folder_is_refused(folder, tmp_path):
    (folder / "optim").rename(tmp_path / "elsewhere")
    (folder / "optim").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="optim is a symbolic link"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/etc/passwd",
        "a/../b",
        "",
        ".",
        "a//b",
        "./a",
        "a\\b",
        "a\0b",
        "manifest.json",
        "a/",
    ],
)
def test_names_outside_the_folder_are_refused(folder, name):
    entry = {"size": 0, "xxh3_128": "0" * 32}
    reseal(folder, lambda body: body["files"].update({name: entry}))
    with pytest.raises(DataError, match="not a plain name"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "entry",
    [None, [], 3, {}, {"size": 1}, {"size": -1, "xxh3_128": "0" * 32},
     {"size": True, "xxh3_128": "0" * 32}, {"size": 1, "xxh3_128": "0"},
     {"size": 1, "xxh3_128": 7}, {"size": 1, "xxh3_128": "0" * 32, "more": 1}],
)  # fmt: skip
def test_entries_that_are_none_are_refused(folder, entry):
    reseal(folder, lambda body: body["files"].update({"weights.bin": entry}))
    with pytest.raises(DataError, match="not a size and a checksum"):
        read_manifest(folder)


def test_another_version_and_other_shapes_are_refused(folder):
    reseal(folder, lambda body: body.update(format_version=99))
    with pytest.raises(DataError, match="format_version 99"):
        read_manifest(folder)
    reseal(folder, lambda body: body.update(format_version=1, files=[]))
    with pytest.raises(DataError, match="must be objects"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", '"x"', "{}", '{"sha256": 3}', "[" * 100_000, '{"a":' * 100_000, "NaN",
     '{"sha256": ' + "9" * 5000 + "}", "\ufeff{}", '{"sha256": "x", "sha256": "y"}'],
)  # fmt: skip
def test_junk_is_refused(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(folder)


def test_a_rewritten_manifest_is_refused_even_with_equal_content(folder):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(DataError, match="damaged"):
        read_manifest(folder)


def test_no_manifest_a_link_a_pipe_and_a_huge_one(folder):
    path = folder / MANIFEST_FILE
    path.rename(folder / "moved")
    with pytest.raises(CheckpointError, match="is missing"):
        read_manifest(folder, CheckpointError)
    path.symlink_to(folder / "moved")
    with pytest.raises(DataError, match="not a plain file"):
        read_manifest(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a plain file"):
        read_manifest(folder)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="above"):
        read_manifest(folder)

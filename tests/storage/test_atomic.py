"""Atomic writes: every crash point, the order of fsync and rename, errors with path and space."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from factorlm.errors import StorageError
from factorlm.storage import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    fileops,
    remove_folder,
    remove_leftovers,
    require_free_space,
    verify,
    write_manifest,
)
from factorlm.testing.faults import SimulatedCrash, crash_at


def save(root, step, content=b"weights"):
    """A save as the trainer does it."""
    with atomic_folder(root / f"step-{step}") as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(content * step)
        (folder / "state.json").write_text("{}")
        write_manifest(folder, {"step": step})


def visible(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def every_crash_point(run):
    """Yield after a crash at each file operation of ``run()``, until it gets through."""
    operation = 1
    while True:
        try:
            with crash_at(operation):
                run()
            return
        except SimulatedCrash:
            yield operation
        operation += 1


def test_write_replaces_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    atomic_write_text(path, "néw")
    assert path.read_bytes() == "néw".encode()
    assert visible(tmp_path) == ["a.txt"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_crash_at_any_operation_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    seen = set()
    for _ in every_crash_point(lambda: atomic_write_bytes(path, b"new" * 1000)):
        seen.add(path.read_bytes())
        remove_leftovers(tmp_path)
        path.write_bytes(b"old")
    assert seen == {b"old", b"new" * 1000}
    assert path.read_bytes() == b"new" * 1000


def test_a_crash_at_any_operation_leaves_whole_folders_only(tmp_path):
    save(tmp_path, 1)
    points = 0
    for _ in every_crash_point(lambda: save(tmp_path, 2)):
        points += 1
        for name in visible(tmp_path):
            verify(tmp_path / name)
        assert "step-1" in visible(tmp_path)
        remove_leftovers(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        if "step-2" in visible(tmp_path):
            remove_folder(tmp_path / "step-2")
    assert points >= 12
    assert visible(tmp_path) == ["step-1", "step-2"]


def test_a_crash_during_removal_leaves_the_folder_whole_or_gone(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    for _ in every_crash_point(lambda: remove_folder(tmp_path / "step-1")):
        for name in visible(tmp_path):
            verify(tmp_path / name)
        remove_leftovers(tmp_path)
        if visible(tmp_path) == ["step-2"]:
            save(tmp_path, 1)
    assert visible(tmp_path) == ["step-2"]


def test_order_is_data_manifest_folder_rename_parent(tmp_path):
    with crash_at() as trace:
        save(tmp_path, 1)
    synced = [name for operation, name in trace if operation == "fsync_path"]
    position = {name: len(synced) - 1 - synced[::-1].index(name) for name in synced}
    renamed = [index for index, (operation, _) in enumerate(trace) if operation == "rename"]
    assert position["weights.bin"] < position["manifest.json"]
    assert position["state.json"] < position["manifest.json"] < position["model"]
    assert trace[-1] == ("fsync_path", tmp_path.name)
    assert renamed[-1] == len(trace) - 2
    assert trace[renamed[-1] - 1][0] == "fsync_path"
    assert trace[renamed[-1] - 1][1].startswith(".tmp-step-1")


def test_nothing_is_removed_before_the_new_folder_is_durable(tmp_path):
    (tmp_path / "model").mkdir()
    with crash_at() as trace, atomic_folder(tmp_path / "model", replace=True) as folder:
        (folder / "weights.bin").write_bytes(b"new")
    operations = [operation for operation, _ in trace]
    assert operations[-3:] == ["rename", "fsync_path", "remove_tree"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights.bin").read_bytes() == b"new"


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(StorageError, match=r"step-1 exists already"):
        save(tmp_path, 1)
    verify(tmp_path / "step-1")


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "half").write_bytes(b"x")
            raise KeyError("body")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_path_need_and_free(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fileops, "write", full)
    with pytest.raises(StorageError, match=r"a\.bin.*needs 12,000 bytes, [\d,]+ bytes are free"):
        atomic_write_bytes(path, b"x" * 12_000)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("limit", [0, 1, 4096, 65_536, 99_999])
def test_a_file_size_limit_leaves_the_old_file_alone(tmp_path, limit):
    code = (
        "import sys, resource\n"
        "from factorlm.storage import atomic_folder\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'weights').write_bytes(b'x' * 100_000)\n"
    )
    target = tmp_path / "step-2"
    save(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"StorageError: cannot write {target}" in done.stderr
    assert visible(tmp_path) == ["step-1"]
    assert len(list(tmp_path.iterdir())) == 1
    verify(tmp_path / "step-1")


def test_unusable_places_are_storage_errors(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300), tmp_path / "missing" / "a"):
        with pytest.raises(StorageError, match="cannot write"):
            atomic_write_text(path, "x")
    with pytest.raises(StorageError, match="cannot remove"):
        remove_folder(tmp_path / "missing")


def test_free_space_is_asked_with_a_margin(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(1100))
    require_free_space(tmp_path, 1000)
    with pytest.raises(StorageError, match=r"needs 1,101 bytes, 1,100 are free"):
        require_free_space(tmp_path, 1001)


class _Usage:
    def __init__(self, free):
        self.free = free

"""Locks: one holder, named to the second; dropped when its process ends in any way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from factorlm.errors import StorageError
from factorlm.storage import folder_lock

HOLD = """
import sys, time
from factorlm.storage import folder_lock
with folder_lock(sys.argv[1], owner="factorlm train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_holder_is_told_who_the_first_is(tmp_path, holder):
    expected = rf"in use by factorlm train \(process {holder.pid} on \S+, since \d{{4}}-"
    with pytest.raises(StorageError, match=expected), folder_lock(tmp_path, owner="other"):
        pass


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_holder_holds_nothing(tmp_path, holder, kill):
    os.kill(holder.pid, kill)
    holder.wait()
    with folder_lock(tmp_path, owner="next"):
        pass


def test_released_at_the_end_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), folder_lock(tmp_path / "new", owner="a"):
            raise KeyError
    with (
        folder_lock(tmp_path / "new", owner="a"),
        pytest.raises(StorageError, match=rf"in use by a \(process {os.getpid()}"),
        folder_lock(tmp_path / "new", owner="b"),
    ):
        pass


def test_errors_of_the_block_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), folder_lock(tmp_path, owner="a"):
        (tmp_path / "missing").read_text()


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_lock_without_a_readable_note_is_still_a_lock(tmp_path, note):
    with folder_lock(tmp_path, owner="a"):
        (tmp_path / ".lock").write_bytes(note)
        with (
            pytest.raises(StorageError, match="has just started"),
            folder_lock(tmp_path, owner="b"),
        ):
            pass


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot lock"), folder_lock(tmp_path / "file", owner=""):
        pass

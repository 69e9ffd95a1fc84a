"""One process at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from factorlm.errors import StorageError
from factorlm.storage.atomic import PathLike, storage_errors

LOCK_FILE = ".lock"
"""In a folder that is held: the lock, and the note of who holds it."""


@contextlib.contextmanager
def folder_lock(folder: PathLike, *, owner: str) -> Iterator[None]:
    """Hold ``folder`` for the block; it is made if it is not there.

    The kernel drops the lock when its holder ends in any way, ``kill -9`` included, so there are no
    stale locks to judge; a note in ``.lock`` says who holds it (``owner``, process, host, time).
    Raises ``StorageError`` at once, naming the holder, if another process has it.
    """
    path = Path(folder) / LOCK_FILE
    with storage_errors(path, verb="lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with storage_errors(path, verb="lock"):
            _take(descriptor, path)
            _write_note(descriptor, owner)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(descriptor, 4096, 0))
        raise StorageError(f"{path.parent} is in use by {holder}") from None


def _write_note(descriptor: int, owner: str) -> None:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    note = {"owner": owner, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(note).encode(), 0)


def _holder(note: bytes) -> str:
    """The note in words; its writer may be between taking the lock and writing it."""
    try:
        values = json.loads(note)
        return "{owner} (process {pid} on {host}, since {since})".format(**values)
    except (ValueError, TypeError, KeyError):
        return "another process that has just started"

"""The file operations behind every durable write, in one place.

Callers use ``fileops.rename(...)`` and not ``os.rename(...)``, so that a test can count the
operations and stop a save at each one of them (``factorlm.testing.faults``).
"""

from __future__ import annotations

import os
import shutil
from io import FileIO
from pathlib import Path


def create(path: Path) -> FileIO:
    """Open a new file for writing, unbuffered; an existing one is an error."""
    return path.open("xb", buffering=0)


def open_append(path: Path) -> FileIO:
    """Open a file for writing at its end, unbuffered; it is made if it is not there."""
    return path.open("ab", buffering=0)


def write(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data``, which one call to the operating system may not do."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def fsync(file: FileIO) -> None:
    """Hand a file's bytes to the disk."""
    os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Hand an existing file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def truncate(path: Path, size: int) -> None:
    """Cut a file to ``size`` bytes."""
    os.truncate(path, size)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its final name; an existing file of that name is replaced."""
    os.rename(source, target)


def make_folder(path: Path) -> None:
    """Make one folder, with its parents."""
    path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Remove one file."""
    path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a folder and all that is in it."""
    shutil.rmtree(path)

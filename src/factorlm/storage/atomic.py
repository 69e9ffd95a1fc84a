"""Files and folders that appear whole or not at all.

The order is always the same: write under a temporary name, fsync the data, fsync the manifest,
rename, fsync the parent folder. A crash at any point leaves the old state or the new one, and at
most a ``.tmp-`` name that ``remove_leftovers`` clears.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from factorlm.errors import StorageError
from factorlm.storage import fileops

TEMPORARY_PREFIX = ".tmp-"
MANIFEST_FILE = "manifest.json"
"""Written last: a folder that has one is complete."""
FREE_SPACE_MARGIN = 1.1

PathLike = str | os.PathLike[str]


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Write a file that holds either its old content or ``data``, whatever happens.

    Raises ``StorageError`` naming the path; a failed write leaves the old content.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with storage_errors(path, need_bytes=len(data)), _removed_on_error(temporary):
        with fileops.create(temporary) as file:
            fileops.write(file, data)
            fileops.fsync(file)
        fileops.rename(temporary, path)
        fileops.fsync_path(path.parent)


def atomic_write_text(path: PathLike, text: str) -> None:
    """``atomic_write_bytes`` of ``text`` as UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; publish it as ``path`` when the block ends.

    An existing ``path`` is refused, unless ``replace``: then it is moved aside between the last
    fsync and the rename, so a crash between these two leaves only its ``.tmp-`` name. What could
    not be made again belongs in numbered folders instead. An error in the block removes the
    temporary folder. Raises ``StorageError`` naming the path.
    """
    path = Path(path)
    if not replace and os.path.lexists(path):
        raise StorageError(f"{path} exists already; remove it first")
    temporary = temporary_name(path)
    with storage_errors(path), _removed_on_error(temporary):
        fileops.make_folder(temporary)
        yield temporary
        _sync_tree(temporary)
        old = _move_aside(path) if os.path.lexists(path) else None
        fileops.rename(temporary, path)
        fileops.fsync_path(path.parent)
        if old is not None:
            _remove_any(old)


def remove_folder(path: PathLike) -> None:
    """Remove a folder so that no crash leaves a part of it under its name."""
    path = Path(path)
    with storage_errors(path, verb="remove"):
        moved = _move_aside(path)
        fileops.fsync_path(path.parent)
        _remove_any(moved)


def remove_leftovers(folder: PathLike) -> list[Path]:
    """Remove the ``.tmp-`` names that a crash left in ``folder``; returns them.

    Call it under the folder's lock only: another process may be filling one of them.
    """
    leftovers = sorted(Path(folder).glob(TEMPORARY_PREFIX + "*"))
    for path in leftovers:
        with storage_errors(path, verb="remove"):
            _remove_any(path)
    return leftovers


def require_free_space(path: PathLike, num_bytes: int) -> None:
    """Raise ``StorageError`` unless the disk of ``path`` has 1.1 times ``num_bytes`` free."""
    with storage_errors(path, verb="ask the free space of"):
        free = shutil.disk_usage(path).free
    need = round(FREE_SPACE_MARGIN * num_bytes)
    if free < need:
        raise StorageError(f"cannot write {path}: needs {need:,} bytes, {free:,} are free")


@contextlib.contextmanager
def storage_errors(
    path: PathLike, *, verb: str = "write", need_bytes: int | None = None
) -> Iterator[None]:
    """Turn any ``OSError`` of the block into a ``StorageError`` that names ``path``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        message = f"cannot {verb} {path}: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += _space(Path(path), need_bytes)
        raise StorageError(message) from error


def temporary_name(path: Path) -> Path:
    """A fresh name beside ``path``, on the same file system, that no reader looks at."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _removed_on_error(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _remove_any(temporary)
        raise


def _sync_tree(folder: Path) -> None:
    """Fsync every file below ``folder``, its manifest last, then the folders from the inside."""
    manifest = folder / MANIFEST_FILE
    folders = [folder]
    for path in sorted(folder.rglob("*"), key=lambda path: (path == manifest, path)):
        if path.is_dir():
            folders.append(path)
        else:
            fileops.fsync_path(path)
    for path in reversed(folders):
        fileops.fsync_path(path)


def _move_aside(path: Path) -> Path:
    moved = temporary_name(path)
    fileops.rename(path, moved)
    return moved


def _remove_any(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        fileops.remove_tree(path)
    else:
        fileops.remove(path)


def _space(path: Path, need_bytes: int | None) -> str:
    """How much is needed and free; the nearest existing parent is asked."""
    while not path.exists() and path != path.parent:
        path = path.parent
    need = "" if need_bytes is None else f"needs {need_bytes:,} bytes, "
    return f"; {need}{shutil.disk_usage(path).free:,} bytes are free"

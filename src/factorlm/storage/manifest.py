"""A folder's manifest: the size and checksum of each of its files, and a seal over itself.

``manifest.json`` is written last, so a folder that has one is complete. Checksums are xxh3-128,
which finds damage; they do not prove who wrote a file. The manifest's own text carries the sha256
of its body and must be, byte for byte, what ``write_manifest`` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from factorlm.errors import DataError, FactorlmError
from factorlm.storage import fileops
from factorlm.storage.atomic import MANIFEST_FILE, PathLike, atomic_write_bytes, storage_errors

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20
CHUNK_BYTES = 4 * 2**20

ErrorType = type[FactorlmError]


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows about one file."""

    size: int
    """Bytes."""
    xxh3_128: str
    """32 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and found whole."""

    files: dict[str, FileEntry]
    """By relative name, with ``/`` between folders."""
    extra: dict[str, Any]
    """What the writer added: plain JSON."""


def write_manifest(
    folder: PathLike,
    extra: Mapping[str, Any],
    files: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Seal ``folder``: write its manifest, durably and last.

    ``files`` are entries that the writer has computed already, of files that are durable; None
    fsyncs and reads every file below the folder, hidden ones left out.
    """
    folder = Path(folder)
    if files is None:
        files = _describe_all(folder)
    manifest = Manifest(dict(sorted(files.items())), dict(extra))
    body = {
        "format_version": FORMAT_VERSION,
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "extra": manifest.extra,
    }
    write_sealed_json(folder / MANIFEST_FILE, body)
    return manifest


def read_manifest(folder: PathLike, error: ErrorType = DataError) -> Manifest:
    """Read a folder's manifest and check the size of every file that it names.

    Raises ``error`` naming the file and what is wrong with it: no manifest, a damaged one, a name
    outside the folder, a file that is missing, is no plain file, or has another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    body = read_sealed_json(path, error)
    if body.get("format_version") != FORMAT_VERSION:
        raise error(f"{path}: format_version {body.get('format_version')!r} is not known")
    files, extra = body.get("files"), body.get("extra")
    if not isinstance(files, dict) or not isinstance(extra, dict):
        raise error(f"{path}: 'files' and 'extra' must be objects")
    manifest = Manifest({name: _entry(path, name, files[name], error) for name in files}, extra)
    for name, entry in manifest.files.items():
        _check_size(folder, name, entry, error)
    return manifest


def verify(folder: PathLike, error: ErrorType = DataError) -> Manifest:
    """``read_manifest``, then compare the checksum of every file; raises ``error`` on damage."""
    folder = Path(folder)
    manifest = read_manifest(folder, error)
    for name, entry in manifest.files.items():
        verify_file(folder / name, entry, error)
    return manifest


def verify_file(path: Path, entry: FileEntry, error: ErrorType = DataError) -> None:
    """Raise ``error`` unless the file has the size and the checksum of ``entry``."""
    found = describe_file(path)
    if found.size != entry.size:
        raise error(f"{path}: has {found.size:,} bytes, the manifest says {entry.size:,}")
    if found != entry:
        raise error(f"{path}: damaged, its checksum differs from the manifest's")


def describe_file(path: PathLike) -> FileEntry:
    """Read a file and return its size and checksum."""
    digest, size = xxhash.xxh3_128(), 0
    with storage_errors(path, verb="read"), open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def write_sealed_json(path: PathLike, body: Mapping[str, Any]) -> None:
    """Write ``body`` atomically as JSON that carries the sha256 of its own content."""
    atomic_write_bytes(path, _sealed_text(dict(body)))


def read_sealed_json(path: PathLike, error: ErrorType = DataError) -> dict[str, Any]:
    """Read what ``write_sealed_json`` wrote; raises ``error`` if any byte differs from it."""
    data = _read_limited(Path(path), error)
    try:
        body = json.loads(data)
        seal = body.pop("sha256")
        whole = seal == _seal(body) and data == _sealed_text(body)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise error(f"{path}: damaged, it is not what was written (its sha256 does not match)")
    return body


def _sealed_text(body: dict[str, Any]) -> bytes:
    text = json.dumps(body | {"sha256": _seal(body)}, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, allow_nan=False).encode("ascii")).hexdigest()


def _read_limited(path: Path, error: ErrorType) -> bytes:
    """A small plain file's bytes; a symbolic link, a pipe or a huge file is refused unread."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path} is missing: the folder is not complete, or not one of ours") from None
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is not a plain file")
    if status.st_size > MAX_MANIFEST_BYTES:
        raise error(f"{path}: has {status.st_size:,} bytes, above {MAX_MANIFEST_BYTES:,}")
    with storage_errors(path, verb="read"):
        return path.read_bytes()


def _entry(manifest: Path, name: str, value: Any, error: ErrorType) -> FileEntry:
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "/".join(parts) == name and ".." not in parts
    if not plain or name.startswith("/") or "\\" in name or "\0" in name or name == MANIFEST_FILE:
        raise error(f"{manifest}: file name {name!r} is not a plain name inside the folder")
    try:
        entry = FileEntry(**value)
        sound = type(entry.size) is int and entry.size >= 0
        sound = sound and re.fullmatch(r"[0-9a-f]{32}", entry.xxh3_128) is not None
    except TypeError:
        sound = False
    if not sound:
        raise error(f"{manifest}: the entry of {name!r} is not a size and a checksum")
    return entry


def _check_size(folder: Path, name: str, entry: FileEntry, error: ErrorType) -> None:
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise error(f"{path} is a symbolic link; files must lie inside their folder")
    try:
        status = os.stat(path)
    except OSError as cause:
        raise error(f"{path}: {cause.strerror or cause}; the manifest names it") from None
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is not a plain file")
    if status.st_size != entry.size:
        raise error(f"{path}: has {status.st_size:,} bytes, the manifest says {entry.size:,}")


def _describe_all(folder: Path) -> dict[str, FileEntry]:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and str(name) != MANIFEST_FILE:
            with storage_errors(path):
                fileops.fsync_path(path)
            files[name.as_posix()] = describe_file(path)
    return files

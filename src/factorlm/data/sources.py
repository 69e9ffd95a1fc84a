"""What a user names as a source: a file, a folder, a glob, a Hugging Face dataset, or a built-in.

A source is an ordered list of parts, each read by one reader, so that a document is found again by
(part, number of the record in it).
"""

from __future__ import annotations

import functools
import glob
import os
import re
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from factorlm.config import check
from factorlm.data.documents import Document
from factorlm.data.readers import (
    Reader,
    Record,
    read_hub_dataset,
    read_json_lines,
    read_parquet,
    read_text,
)
from factorlm.errors import DataError, did_you_mean

READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".parquet": read_parquet,
}
"""By file name ending."""

HUB_PREFIX = "hf:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
STDLIB = "python-stdlib"
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class SourcePart:
    """One file, or one streamed dataset."""

    name: str
    """Relative to the source; the parts are in the order of their names."""
    size: int | None
    """Bytes; None if it is not known before it is read."""
    modified_ns: int
    """Time of last change, to notice one between two runs."""
    read: Callable[[str, int], Iterator[Record]]
    """Records from (text column, number of records to skip)."""
    is_document: bool
    """Whether it holds one document, as a text file does, and not many records."""


@dataclass(frozen=True)
class Source:
    """A named source with at least one part."""

    spec: str
    parts: tuple[SourcePart, ...]

    @property
    def size(self) -> int | None:
        """Bytes of all parts; None if one is not known."""
        sizes = [part.size for part in self.parts if part.size is not None]
        return sum(sizes) if len(sizes) == len(self.parts) else None

    def is_single_document(self, column: str) -> bool:
        """Whether all that it holds is one document. Bad and empty records do not count."""
        num_documents = 0
        for part in self.parts:
            for record in part.read(column, 0):
                num_documents += isinstance(record, Document) and record.num_bytes > 0
                if num_documents > 1:
                    return False
        return num_documents == 1


def open_source(spec: str) -> Source:
    """Find what ``spec`` names. Raises ``DataError`` if there is nothing, or nothing of use."""
    if spec == STDLIB:
        return Source(spec, _stdlib_parts())
    if spec.startswith(HUB_PREFIX):
        return Source(spec, (_hub_part(spec.removeprefix(HUB_PREFIX)),))
    path = Path(spec)
    if path.is_dir():
        return Source(spec, _folder_parts(path))
    if os.path.lexists(path):
        return Source(spec, (_file_part(path, path.name),))
    if glob.has_magic(spec):
        return Source(spec, _glob_parts(spec))
    if HUB_ID.fullmatch(spec) and _suffix(path) is None:
        return Source(spec, (_hub_part(spec),))
    hint = did_you_mean(path.name, _names(path.parent))
    raise DataError(f"source '{spec}': no such file, folder, pattern or dataset.{hint}")


def _suffix(path: Path) -> str | None:
    """The ending of a file name that has a reader; the longest, so that .jsonl.gz is one."""
    found = [suffix for suffix in READERS if path.name.lower().endswith(suffix)]
    return max(found, key=len) if found else None


def _file_part(path: Path, name: str, reader: Reader | None = None) -> SourcePart:
    suffix = _suffix(path)
    if reader is None and suffix is None:
        raise DataError(f"{path}: no reader for this kind of file; known: {', '.join(READERS)}")
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing
        raise DataError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a plain file")
    reader = reader or READERS[str(suffix)]
    read = functools.partial(reader, path)
    return SourcePart(name, status.st_size, status.st_mtime_ns, read, reader is read_text)


def _folder_parts(folder: Path) -> tuple[SourcePart, ...]:
    """All readable files below a folder, hidden ones left out."""
    parts = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if _suffix(path) is not None and not hidden and not path.is_dir():
            parts.append(_file_part(path, name.as_posix()))
    return _sorted(parts, f"folder {folder}")


def _glob_parts(pattern: str) -> tuple[SourcePart, ...]:
    paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    return _sorted(
        (_file_part(path, path.as_posix()) for path in paths if not path.is_dir()),
        f"pattern {pattern}",
    )


def _stdlib_parts() -> tuple[SourcePart, ...]:
    """The sources of the running interpreter's standard library, one document a module."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in folder.rglob("*.py")
        if not STDLIB_LEFT_OUT.intersection(path.relative_to(folder).parts) and _is_utf8(path)
    ]
    names = (path.relative_to(folder).as_posix() for path in paths)
    parts = (_file_part(path, name, read_text) for path, name in zip(paths, names, strict=True))
    return _sorted(parts, f"standard library {folder}")


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _hub_part(spec: str) -> SourcePart:
    """``name[:config][:split]``; the split is ``train`` if none is named."""
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    check(bool(name), f"source 'hf:{spec}': write hf:name[:config][:split]")
    read = functools.partial(read_hub_dataset, name, config or None, split or "train")
    return SourcePart(spec, None, 0, read, is_document=False)


def _sorted(parts: Iterable[SourcePart], what: str) -> tuple[SourcePart, ...]:
    found = tuple(sorted(parts, key=lambda part: part.name))
    if not found:
        raise DataError(f"{what}: holds no file of a known kind ({', '.join(READERS)})")
    return found


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []

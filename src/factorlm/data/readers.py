"""Read the documents of one file, in order: text, JSON lines (plain, gzip, zstd) and parquet.

A reader is a function of (file, text column, number of records to skip). It yields a ``Document``
or a ``BadRecord`` for each record, and raises ``DataError`` where the file itself is damaged: cut
short, not what its name says, without the column.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

from factorlm.data.documents import PIECE_BYTES, Document, FileDocument, TextDocument
from factorlm.errors import ConfigError, DataError, did_you_mean

MAX_LINE_BYTES = 64 * 2**20
PARQUET_BATCH_BYTES = 4 * 2**20
READ_BYTES = 2**20
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    origin: str
    """``file:line:column``, as far as they are known."""
    reason: str
    """A few words that stay the same, to count by."""
    position: int
    """Bytes of the input file that are read once this record is done."""


Record = Document | BadRecord
Reader = Callable[[Path, str, int], Iterator[Record]]


def read_text(path: Path, column: str, skip: int) -> Iterator[Record]:
    """One document: the whole file. A byte order mark is left out; ``column`` has no meaning."""
    if skip:
        return
    size = path.stat().st_size
    bad = _find_bad_utf8(path)
    if bad is not None:
        yield BadRecord(f"{path}:{bad}", "not UTF-8", size)
        return
    with path.open("rb") as file:
        head = len(BOM) if file.read(len(BOM)) == BOM else 0
        if size <= PIECE_BYTES:
            file.seek(head)
            yield TextDocument(str(path), size, file.read())
        else:
            yield FileDocument(str(path), size, path, head, size - head)


def read_json_lines(path: Path, column: str, skip: int) -> Iterator[Record]:
    """One document a line: the string under ``column`` of a JSON object."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty, as a file is whose writing was cut off")
    with _open_decompressed(path) as (file, tell):
        for number in count(1):
            with _damage(f"{path}:{number}"):
                line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            too_long = len(line) > MAX_LINE_BYTES
            if too_long:
                _skip_line(file, line, f"{path}:{number}")
            if number <= skip:
                continue
            origin = f"{path}:{number}"
            if too_long:
                yield BadRecord(origin, f"longer than {MAX_LINE_BYTES:,} bytes", tell())
                continue
            if number == 1:
                line = line.removeprefix(BOM)
            line = line.rstrip(b"\r\n")
            yield _parse_line(line, column, origin, tell())


def read_parquet(path: Path, column: str, skip: int) -> Iterator[Record]:
    """One document a row: the string in ``column``. Page checksums are checked where present."""
    import pyarrow.parquet as pq

    with _damage(str(path)):
        file = pq.ParquetFile(
            path, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
        )
    with file:
        _check_column(path, file.schema_arrow, column)
        size, total, row = path.stat().st_size, file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows > skip:
                texts = _parquet_texts(file, group, column, f"{path}: row group {group}")
                first = max(skip - row, 0)
                for number, text in enumerate(islice(texts, first, None), row + first):
                    yield _as_document(text, f"{path}: row {number}", size * (number + 1) // total)
            row += rows


def read_hub_dataset(name: str, config: str | None, split: str, column: str, skip: int) -> Any:
    """Stream a Hugging Face dataset: an id or a local folder. One document a row.

    No code of the dataset is run. Raises ``DataError`` if it cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError("Hugging Face datasets need: pip install 'factorlm[hub]'") from None
    label = f"hf:{name}"
    with _damage(label):
        rows = load_dataset(name, config, split=split, streaming=True)
        rows = iter(rows.skip(skip) if skip else rows)
    for number in count(skip):
        with _damage(f"{label}: row {number}"):
            row = next(rows, None)
        if row is None:
            return
        if column not in row:
            raise DataError(f"{label}: {_no_column(column, list(row))}")
        yield _as_document(row[column], f"{label}: row {number}", number + 1)


def _find_bad_utf8(path: Path) -> str | None:
    """``line:column`` (in bytes) of the first byte that is not UTF-8; None if all are."""
    decoder, line, column = codecs.getincrementaldecoder("utf-8")(), 1, 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(READ_BYTES)
            pending = decoder.getstate()[0]
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line, column = _advance((pending + chunk)[: error.start], line, column)
                return f"{line}:{column}"
            if not chunk:
                return None
            done = pending + chunk
            done = done[: len(done) - len(decoder.getstate()[0])]
            line, column = _advance(done, line, column)


def _advance(data: bytes, line: int, column: int) -> tuple[int, int]:
    breaks = data.count(b"\n")
    last = data.rfind(b"\n")
    return line + breaks, (column + len(data) if last < 0 else len(data) - last)


@contextmanager
def _open_decompressed(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The plain bytes of a file, and how many bytes of the file itself are read.

    Arrow's streams notice a gzip or zstd frame that is cut short, and never unpack more than a
    buffer ahead.
    """
    import pyarrow as pa

    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    raw: Any = pa.OSFile(str(path))
    stream: Any = pa.CompressedInputStream(raw, codec) if codec else raw
    with raw, stream, io.BufferedReader(stream, READ_BYTES) as file:
        yield file, raw.tell


def _skip_line(file: IO[bytes], part: bytes, origin: str) -> None:
    while part and not part.endswith(b"\n"):
        with _damage(origin):
            part = file.readline(READ_BYTES)


def _parse_line(line: bytes, column: str, origin: str, position: int) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"{origin}:{error.start + 1}", "not UTF-8", position)
    except json.JSONDecodeError as error:
        reason = "not JSON" if line.strip() else "a blank line"
        return BadRecord(f"{origin}:{error.colno}", reason, position)
    except RecursionError:
        return BadRecord(origin, "nested too deep", position)
    except ValueError:
        return BadRecord(origin, "a number of too many digits", position)
    if not isinstance(value, dict):
        return BadRecord(origin, "not a JSON object", position)
    if column not in value:
        return BadRecord(origin, f"no '{column}'", position)
    return _as_document(value[column], origin, position)


def _as_document(text: Any, origin: str, position: int) -> Record:
    if text is None:
        return BadRecord(origin, "the text is null", position)
    if isinstance(text, bytes):
        return BadRecord(origin, "not UTF-8", position)
    if not isinstance(text, str):
        return BadRecord(origin, "the text is not a string", position)
    try:
        return TextDocument(origin, position, text.encode("utf-8"))
    except UnicodeEncodeError:
        return BadRecord(origin, "a lone surrogate in the text", position)


def _check_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise DataError(f"{path}: {_no_column(column, schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_kind(kind) for is_kind in strings):
        raise DataError(f"{path}: column '{column}' holds {kind}, not text")


def _no_column(column: str, names: list[str]) -> str:
    return f"no column '{column}'; it has {', '.join(names)}.{did_you_mean(column, names)}"


def _parquet_texts(file: Any, group: int, column: str, origin: str) -> Iterator[Any]:
    """The strings of a row group, in batches of a few MB; bytes for one that is not UTF-8."""
    details = file.metadata.row_group(group)
    row_bytes = max(details.total_byte_size // max(details.num_rows, 1), 1)
    batch_rows = min(max(PARQUET_BATCH_BYTES // row_bytes, 1), 4096)
    with _damage(origin):
        batches = file.iter_batches(
            batch_rows, row_groups=[group], columns=[column], use_threads=False
        )
    while True:
        with _damage(origin):
            batch = next(batches, None)
        if batch is None:
            return
        for scalar in batch.column(0):
            try:
                yield scalar.as_py()
            except UnicodeDecodeError:
                yield b""


@contextmanager
def _damage(origin: str) -> Iterator[None]:
    """Turn a library's error about the bytes that it reads into a ``DataError``."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow, datasets and the hub each raise many kinds
        raise DataError(f"{origin}: cannot be read: {' '.join(str(error).split())}") from error

"""Readers: good records exactly, bad records by reason and place, damaged files by name."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from factorlm.data import readers
from factorlm.data.documents import PIECE_BYTES, Document, FileDocument
from factorlm.data.readers import BadRecord, read_json_lines, read_parquet, read_text
from factorlm.errors import DataError

TEXTS = ["first", "zweite\nZeile", "", "漢字 🎉", "x" * 5000, "\x00 and \t"]


def texts_of(records):
    records = list(records)
    assert all(isinstance(record, Document) for record in records), records
    return [record.read(0, record.num_bytes).decode("utf-8") for record in records]


def compress(data, suffix):
    if suffix == ".jsonl.gz":
        return gzip.compress(data)
    return zstandard.compress(data) if suffix == ".jsonl.zst" else data


def write_lines(path, lines):
    data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(compress(data, "".join(path.suffixes)))
    return path


def write_json(path, texts):
    return write_lines(path, [json.dumps({"id": 1, "text": text}) for text in texts])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("skip", [0, 1, 5, 6, 9])
def test_json_lines(tmp_path, suffix, skip):
    path = write_json(tmp_path / f"a{suffix}", TEXTS)
    assert texts_of(read_json_lines(path, "text", skip)) == TEXTS[skip:]
    positions = [record.position for record in read_json_lines(path, "text", 0)]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_several_frames_are_one_file(tmp_path, suffix):
    path = write_json(tmp_path / f"a{suffix}", TEXTS)
    path.write_bytes(path.read_bytes() * 3)
    assert texts_of(read_json_lines(path, "text", 0)) == TEXTS * 3


def test_json_lines_with_a_mark_crlf_and_no_last_break(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    assert texts_of(read_json_lines(path, "text", 0)) == ["a", "b"]


BAD_LINES = {
    "{": ("a.jsonl:2:2", "not JSON"),
    '{"text": "a}': ("a.jsonl:2:10", "not JSON"),
    '{"text": "a\0"}': ("a.jsonl:2:12", "not JSON"),
    "": ("a.jsonl:2:1", "a blank line"),
    "  ": ("a.jsonl:2:3", "a blank line"),
    "[1]": ("a.jsonl:2", "not a JSON object"),
    '"text"': ("a.jsonl:2", "not a JSON object"),
    '{"txt": "a"}': ("a.jsonl:2", "no 'text'"),
    '{"text": null}': ("a.jsonl:2", "the text is null"),
    '{"text": 3}': ("a.jsonl:2", "the text is not a string"),
    '{"text": ["a"]}': ("a.jsonl:2", "the text is not a string"),
    '{"text": "\\ud800"}': ("a.jsonl:2", "a lone surrogate in the text"),
    '{"text": "ab\ud800"}': ("a.jsonl:2:13", "not UTF-8"),
    '{"a": ' + "[" * 100_000: ("a.jsonl:2", "nested too deep"),
    '{"a": ' + "9" * 10_000 + "}": ("a.jsonl:2", "a number of too many digits"),
    '\ufeff{"text": "a"}': ("a.jsonl:2:1", "not JSON"),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:16]))
def test_bad_lines_are_named_and_passed(tmp_path, line):
    good = json.dumps({"text": "good"})
    path = write_lines(tmp_path / "a.jsonl", [good, line, good])
    first, bad, last = read_json_lines(path, "text", 0)
    place, reason = BAD_LINES[line]
    assert isinstance(bad, BadRecord)
    assert bad.reason == reason
    assert bad.origin == str(tmp_path / place)
    assert texts_of([first, last]) == ["good", "good"]


def test_a_line_that_is_too_long_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100_000)
    good = json.dumps({"text": "good"})
    long = json.dumps({"text": "x" * 30_000_000})
    path = write_lines(tmp_path / "a.jsonl", [good, long, good])
    tracemalloc.start()
    first, bad, last = read_json_lines(path, "text", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (bad.origin, bad.reason) == (f"{path}:2", "longer than 100,000 bytes")
    assert texts_of([first, last]) == ["good", "good"]
    assert peak < 5_000_000
    assert texts_of(read_json_lines(path, "text", 2)) == ["good"]


def test_the_longest_allowed_line(tmp_path, monkeypatch):
    line = json.dumps({"text": "x" * 1000})
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", len(line) + 1)
    path = write_lines(tmp_path / "a.jsonl", [line, line[:-2] + 'x"}', line])
    records = list(read_json_lines(path, "text", 0))
    assert [isinstance(record, BadRecord) for record in records] == [False, True, False]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_every_cut_of_a_compressed_file_is_noticed(tmp_path, suffix):
    generator = random.Random(0)
    texts = [generator.randbytes(200).hex() for _ in range(100)]
    path = write_json(tmp_path / f"a{suffix}", texts)
    data = path.read_bytes()
    for size in [0, 1, len(data) - 1, *generator.sample(range(len(data)), 60)]:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=rf"a\{suffix}"):
            list(read_json_lines(path, "text", 0))


def test_cut_plain_lines_are_noticed(tmp_path):
    path = write_json(tmp_path / "a.jsonl", ["some text"] * 20)
    data = path.read_bytes()
    for size in range(1, len(data)):
        if data[size - 1 : size + 1] not in (b"}\n", b"\n{"):
            path.write_bytes(data[:size])
            *_, last = read_json_lines(path, "text", 0)
            assert isinstance(last, BadRecord)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        list(read_json_lines(path, "text", 0))


def test_damage_inside_a_compressed_file_is_named_with_its_line(tmp_path):
    path = write_json(tmp_path / "a.jsonl.gz", [os.urandom(2000).hex() for _ in range(2000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: cannot be read"):
        list(read_json_lines(path, "text", 0))


def write_parquet(path, texts, kind=None, **options):
    kind = kind or pa.string()
    columns = {"id": list(range(len(texts))), "text": pa.array(texts, kind)}
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet(tmp_path, kind):
    path = write_parquet(tmp_path / "a.parquet", TEXTS * 5, kind, row_group_size=7)
    for skip in (0, 1, 6, 7, 8, 14, 29, 30, 31):
        assert texts_of(read_parquet(path, "text", skip)) == (TEXTS * 5)[skip:]
    *_, last = read_parquet(path, "text", 0)
    assert last.position == path.stat().st_size
    assert last.origin == f"{path}: row 29"


def test_parquet_rows_without_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    first, bad, last = read_parquet(path, "text", 0)
    assert (bad.origin, bad.reason) == (f"{path}: row 1", "the text is null")
    assert texts_of([first, last]) == ["a", "c"]


def test_parquet_rows_that_are_not_utf8(tmp_path):
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    reasons = [getattr(record, "reason", None) for record in read_parquet(
        tmp_path / "a.parquet", "text", 0)]  # fmt: skip
    assert reasons == [None, "not UTF-8", None]


def test_parquet_is_read_in_small_batches(tmp_path):
    """A row group of 32 MB in pages of 1 MB: no more than a batch and a page are in memory."""
    texts = [os.urandom(16_000).hex() for _ in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", texts, use_dictionary=False, write_batch_size=8)
    del texts
    before, peak = pa.total_allocated_bytes(), 0
    for _ in read_parquet(path, "text", 0):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 12 * 2**20


@pytest.mark.parametrize(
    ("column", "message"),
    [("txt", r"no column 'txt'; it has id, text\. Did you mean 'text'"), ("id", "holds int64")],
)
def test_parquet_with_the_wrong_column(tmp_path, column, message):
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(DataError, match=message):
        list(read_parquet(path, column, 0))


def test_every_cut_of_a_parquet_file_is_noticed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [os.urandom(50).hex() for _ in range(300)])
    data = path.read_bytes()
    for size in [0, 1, 4, len(data) - 1, *random.Random(0).sample(range(len(data)), 60)]:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"a\.parquet"):
            list(read_parquet(path, "text", 0))


def test_damaged_pages_with_checksums_are_noticed(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        [os.urandom(50).hex() for _ in range(300)],
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    data = path.read_bytes()
    at = len(data) // 3
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(DataError, match=r"a\.parquet: row group 0: cannot be read"):
        list(read_parquet(path, "text", 0))


@pytest.mark.parametrize("size", [0, 5, PIECE_BYTES - 3, PIECE_BYTES + 10])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_files(tmp_path, size, mark):
    path = tmp_path / "a.txt"
    text = ("line é\r\n" * (size // 9 + 1))[:size].encode("utf-8")
    path.write_bytes(mark + text)
    (document,) = read_text(path, "", 0)
    assert isinstance(document, FileDocument) == (len(mark + text) > PIECE_BYTES)
    assert document.num_bytes == len(text)
    assert document.read(0, len(text)) == text
    assert not list(read_text(path, "", 1))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"\xff", "1:1"),
        (b"ab\xc3", "1:3"),
        (b"one\ntwo\n\xc3\xa9x\xe6\xbc", "3:4"),
        (b"x" * 2**20 + b"\n" + b"\xc3\xa9" * 2**19 + b"\x80", f"2:{2**20 + 1}"),
        (b"x" * (2**20 - 1) + b"\xc3\xa9\nabc\xfe", "2:4"),
    ],
)
def test_text_that_is_not_utf8_is_named_by_line_and_column(tmp_path, data, place):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    (bad,) = read_text(path, "", 0)
    assert (bad.origin, bad.reason) == (f"{path}:{place}", "not UTF-8")

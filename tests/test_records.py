from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.errors import DataError, StorageError
from factorlm.records import (
    LOSS_SPIKE,
    EventRecord,
    LayerValues,
    MonitorRecord,
    RecordFile,
    StepRecord,
)


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number, num_tokens=number, loss=1.5, learning_rate=0.1, grad_norm=1.0, step_ms=2.0
    )


def monitor(number: int) -> MonitorRecord:
    values = LayerValues(
        factor_norms={"V": 1.0, "U": float("inf")}, product_rms=0.5, change_rms=0.1, grad_norm=2.0
    )
    return MonitorRecord(step=number, guide_alpha=0.5, layers={"a.b": values})


@pytest.fixture
def records(tmp_path: Path) -> RecordFile:
    return RecordFile(tmp_path / "records.jsonl")


def test_round_trip(records: RecordFile) -> None:
    written = [step(1), EventRecord(event="größer", step=1, detail={"a": [1, None]}), step(2)]
    written.append(monitor(2))
    for record in written:
        records.append(record)
    assert list(records) == written


def test_what_a_later_version_wrote_is_skipped(records: RecordFile) -> None:
    records.append(step(1))
    newer = step(2).to_json().replace('"format_version": 1', '"format_version": 2')
    records.path.open("a").write(f'{{"type": "new", "format_version": 1, "x": 1}}\n{newer}\n\n')
    records.append(step(3))
    assert list(records) == [step(1), step(3)]


@pytest.mark.parametrize("half", [b'{"type": "st', b"\xff\xfe", b"[]"])
def test_half_written_last_line_is_left_out(records: RecordFile, half: bytes) -> None:
    records.append(step(1))
    records.path.open("ab").write(half)
    assert list(records) == [step(1)]
    records.append(step(2))
    assert list(records) == [step(1), step(2)]


@pytest.mark.parametrize("half", [b'{"type": "st', b"\xff\xfe"])
@pytest.mark.parametrize("before", [(), (step(1),)])
def test_a_record_after_a_half_written_line_is_whole(
    records: RecordFile, before: tuple[StepRecord, ...], half: bytes
) -> None:
    """As ``factorlm eval`` writes one to a run that was killed; the run has to go on after it."""
    for record in before:
        records.append(record)
    records.path.open("ab").write(half)
    records.append(step(2))
    assert list(records) == [*before, step(2)]


def test_a_last_line_without_its_break_is_kept(records: RecordFile) -> None:
    records.path.write_text(step(1).to_json())
    records.append(step(2))
    assert list(records) == [step(1), step(2)]


def test_a_record_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "gone" / "records.jsonl")
    with pytest.raises(StorageError, match=r"cannot write .*gone/records\.jsonl"):
        records.append(step(1))


@pytest.mark.parametrize(
    "line",
    [
        b'{"type": "st',
        b"\xff\xfe",
        b"5",
        b"null",
        b"[]",
        b"{}",
        b'{"type": "step", "format_version": 1}',
        b'{"type": [], "format_version": 1}',
        b'{"type": "event", "format_version": 1, "event": "e", "step": 1, "other": 2}',
        b"[" * 100_000,
    ],
)
def test_damaged_line_is_named(records: RecordFile, line: bytes) -> None:
    records.append(step(1))
    records.path.open("ab").write(line + b"\n")
    records.append(step(2))
    with pytest.raises(DataError, match=r"records\.jsonl:2: not a record"):
        list(records)


def test_drop_after_keeps_what_is_not_done_again(records: RecordFile) -> None:
    kept = [step(1), monitor(1), EventRecord(event=LOSS_SPIKE, step=1)]
    kept.append(EventRecord(event="save failed", step=2))
    for record in (*kept, step(2), monitor(2), EventRecord(event=LOSS_SPIKE, step=2), step(3)):
        records.append(record)
    records.path.open("ab").write(b'{"type": "step", "fo')
    records.drop_after(1, 1)
    records.append(step(2))
    assert list(records) == [*kept, step(2)]


def test_drop_after_keeps_what_a_later_version_wrote(records: RecordFile) -> None:
    newer = '{"type": "new", "format_version": 1, "step": 3, "x": 1}\n'
    records.append(step(1))
    records.path.open("a").write(newer)
    records.append(step(2))
    records.drop_after(1, 1)
    assert records.path.read_text() == step(1).to_json() + "\n" + newer

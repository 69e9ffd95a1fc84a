"""``factorlm bench``."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.bench import kernel
from factorlm.bench.cases import Bar
from factorlm.bench.options import LinearSetting
from factorlm.cli.main import main
from factorlm.records import BenchmarkRecord, RecordFile

SMALL = ["--shapes", "16x64", "--tokens", "8", "--rounds", "2", "--dtypes", "fp32"]


def test_prints_tables_and_appends_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "kernel.jsonl"
    command = ["bench", "kernel", *SMALL, "--passes", "forward", "--output", str(output)]
    assert main(command) == 0
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "kernel  16x64  8 tokens  fp32  forward" in text
    records = list(RecordFile(output))
    assert [type(record) for record in records] == [BenchmarkRecord, BenchmarkRecord]
    assert set(records[0].cases) == set(records[1].cases)  # type: ignore[attr-defined]
    for name in records[0].cases:  # type: ignore[attr-defined]
        assert f"\n{name}" in text


@pytest.mark.parametrize(("limit", "code"), [(0.0, 1), (1e9, 0)])
def test_strict_exits_1_where_a_bar_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: float, code: int
) -> None:
    monkeypatch.setattr(LinearSetting, "is_promised", True)
    monkeypatch.setattr(kernel, "kernel_bars", lambda *args: [Bar(name="x", value=1, limit=limit)])
    command = ["bench", "kernel", *SMALL, "--passes", "forward"]
    assert main([*command, "--strict"]) == code
    assert main(command) == 0
    assert ("MISSED  x: " in capsys.readouterr().out) is bool(code)


@pytest.mark.parametrize("name", ["ffn", "premerge", "model"])
def test_every_benchmark_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path))
    sizes = ["--width", "64", "--layers", "2"]
    assert main(["bench", name, *SMALL, *sizes, "--structures", "low_rank"]) == 0
    assert capsys.readouterr().out.startswith(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "--shapes", "768"], "'768' must be inputs x outputs, such as 768x3072"),
        (["kernl"], "invalid choice: 'kernl'"),
        (["kernel", "--structures", "low_rnk"], "Did you mean 'low_rank'"),
        (["kernel", "--output", "nowhere/x.jsonl"], "--output nowhere/x.jsonl: no such folder"),
        (["kernel", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_wrong_arguments_exit_3_before_anything_is_timed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 3
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""

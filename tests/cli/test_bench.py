"""``factorlm bench``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factorlm.bench import kernel
from factorlm.bench.cases import Bar
from factorlm.bench.options import LinearSetting
from factorlm.cli.bench import BENCHMARKS
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


SIZES = {
    "kernel": ["--shapes", "16x64", "--tokens", "8"],
    "ffn": ["--shapes", "16x64", "--tokens", "8"],
    "premerge": ["--shapes", "16x64", "--tokens", "8"],
    "model": ["--width", "64", "--layers", "2", "--tokens", "8"],
    "decode": ["--width", "64", "--layers", "2", "--new-tokens", "4", "--batch-sizes", "1"],
    "throughput": ["--width", "64", "--layers", "2", "--new-tokens", "4"],
}


SLOW = {"decode": pytest.mark.slow}
"""It compiles the steps."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in BENCHMARKS]
)
def test_every_benchmark_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path))
    monkeypatch.setattr("factorlm.bench.throughput.free_memory_bytes", lambda device: 10**6)
    short = ["--rounds", "2", "--dtypes", "fp32", "--structures", "low_rank"]
    assert main(["bench", name, *SIZES[name], *short]) == 0
    assert capsys.readouterr().out.startswith(name)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the benchmarks are called with; nothing is timed."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str) -> Callable[..., list[BenchmarkRecord]]:
        return lambda *args: calls.append((name, *args)) or []  # type: ignore[func-returns-value]

    for name in BENCHMARKS:
        monkeypatch.setattr(f"factorlm.bench.{name}.benchmark_{name}", note(name))
    return calls


def test_defaults_are_what_the_bars_are_set_for(asked: list[tuple[Any, ...]]) -> None:
    for name in BENCHMARKS:
        assert main(["bench", name, "--dtypes", "fp32"]) == 0
    kernel, ffn, premerge, model, decode, throughput = asked
    for one in (kernel, ffn):
        assert one[1].shapes == ((768, 3072), (2048, 8192))
        assert one[1].num_tokens == (4096,)
    assert premerge[1].num_tokens == tuple(2**power for power in range(14))
    assert premerge[1].rounds == 50
    assert min(width for width, _ in premerge[1].shapes) == 512
    assert (model[1].num_tokens, model[2].width, model[2].num_layers) == ((8192,), 768, 12)
    assert (decode[2].width, decode[3].batch_sizes) == (1024, (1, 8))
    assert (throughput[2].width, throughput[3].num_new_tokens) == (1024, 256)
    assert throughput[2].context_length >= 256 + throughput[3].num_prompt_tokens


def test_forms_of_an_ffn(asked: list[tuple[Any, ...]]) -> None:
    for flags in ([], ["--gated"], ["--compiled"]):
        assert main(["bench", "ffn", *flags]) == 0
    found = [(options.gated, options.compiled) for _, options in asked]
    assert found == [(False, False), (True, False), (False, True)]


def test_several_shares_and_widths(asked: list[tuple[Any, ...]]) -> None:
    both = ["--share", "0.25", "0.5"]
    assert main(["bench", "kernel", *both]) == 0
    assert [options.share for _, options in asked] == [0.25, 0.5]
    asked.clear()
    assert main(["bench", "model", *both, "--width", "64", "128"]) == 0
    assert [(options.share, shape.width) for _, options, shape in asked] == [
        (0.25, 64), (0.25, 128), (0.5, 64), (0.5, 128),
    ]  # fmt: skip


def test_titles_tell_shares_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernel", *SMALL, "--passes", "forward", "--share", "0.25", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "forward  share 0.25\n" in text
    assert "forward  share 0.5\n" in text


@pytest.mark.usefixtures("asked")
def test_says_how_to_get_the_guided_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernel"]) == 0
    assert "add --tokens 16384 --shapes 768x3072" in capsys.readouterr().err
    assert main(["bench", "kernel", "--tokens", "16384"]) == 0
    assert main(["bench", "ffn"]) == 0
    assert "guided" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "--shapes", "768"], "'768' must be inputs x outputs, such as 768x3072"),
        (["kernl"], "invalid choice: 'kernl'"),
        (["kernel", "--structures", "low_rnk"], "Did you mean 'low_rank'"),
        (["kernel", "--output", "nowhere/x.jsonl"], "--output nowhere/x.jsonl: no such folder"),
        (["kernel", "--device", "cuda:99"], "--device cuda:99"),
        (["kernel", "--width", "768"], "--width does not concern bench kernel, only model, decode"),
        (["model", "--passes", "forward"], "--passes does not concern bench model"),
        (["kernel", "--gated"], "--gated does not concern bench kernel, only ffn"),
        (["decode", "--tokens", "8"], "--tokens does not concern bench decode"),
        (["throughput", "--batch-sizes", "8"], "--batch-sizes does not concern bench throughput"),
        (["throughput", "--strict"], "--strict does not concern bench throughput"),
        (["decode", "--plot", "x.png"], "--plot does not concern bench decode"),
        (["kernel", "--share", "0.2", "1.5"], "share=1.5 must lie in (0, 1]"),
        (["kernel", "--share", "0.2", "0.3", "--plot", "x.png"], "only one --share can be drawn"),
        (["model", "--width", "64", "100"], "width=100 must be a multiple"),
    ],
)
def test_wrong_arguments_exit_3_before_anything_is_timed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 3
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""

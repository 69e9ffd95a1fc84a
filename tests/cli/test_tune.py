from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import factorlm
from factorlm.cli.main import main
from factorlm.inference import LayerCase, premerge_, tune
from factorlm.inference.latency import cached_table, table_path
from factorlm.measure import Measurement
from factorlm.testing.models import tiny_model


def fake(cases: Mapping[str, Callable[[], object]], **options: object) -> dict[str, Measurement]:
    """2 ms by the factors; merged, 1 ms with one token and one more for every further one."""
    merged_ms = float(cases["merged"]().shape[0])
    times = {"structured": 2.0, "merged": merged_ms}
    return {
        name: Measurement(latencies_ms=(time,) * 3, calls_per_round=1)
        for name, time in times.items()
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no clock."""
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(tune.__kwdefaults__, "measure", fake)
    return tmp_path / "cache"


def test_table_and_cache(tiny_run, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(tiny_run.path), "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "low_rank 32x80 float32" in out
    assert "low_rank 80x32 float32" in out
    cells = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    rows = [cell[1:-1] for cell in cells if len(cell) > 2]
    assert rows == [["1", "2", "1", "0", "merged"], ["2", "2", "2", "0", "factors"]] * 2
    assert f"kept in {cache / 'premerge'}" in out
    assert len(list((cache / "premerge").glob("*.json"))) == 2


def test_premerge_finds_what_the_command_left(tiny_run) -> None:
    assert main(["tune", str(tiny_run.path), "--max-tokens", "2"]) == 0
    report = premerge_(factorlm.load(tiny_run.path))
    assert {row.source for row in report.rows} == {"measured"}
    assert all(row.merged and row.policy.merged == (True, False) for row in report.rows)


def test_json_and_dtype(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--max-tokens", "1", "--dtype", "bfloat16", "--device", "cpu", "--json"]
    assert main(["tune", str(tiny_run.path / "model"), *arguments]) == 0
    first, _ = found = json.loads(capsys.readouterr().out)
    layers = factorlm.load(tiny_run.path, dtype=torch.bfloat16).model.layers[1].mlp
    assert [entry["in_features"] for entry in found] == [32, 80]
    case = LayerCase.of(layers.c_fc)
    assert {key: first[key] for key in case.key()} == case.key()
    assert first["copy_bytes"] == 32 * 80 * 2
    expected = {"num_tokens": 1, "structured_ms": 2.0, "merged_ms": 1.0, "noise_ms": 0.0}
    assert first["rows"] == [expected | {"merges": True}]
    assert cached_table(case) is not None
    assert str(table_path(case)).endswith(".json")


def test_the_default_goes_to_8192_tokens(
    tiny_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def instant(cases: Mapping[str, object], **options: object) -> dict[str, Measurement]:
        return {name: Measurement(latencies_ms=(1.0, 1.0), calls_per_round=1) for name in cases}

    monkeypatch.setitem(tune.__kwdefaults__, "measure", instant)
    assert main(["tune", str(tiny_run.path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[0]["rows"]
    assert [row["num_tokens"] for row in rows] == [2**power for power in range(14)]
    assert not any(row["merges"] for row in rows)


def test_a_model_without_structured_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    assert main(["tune", str(tmp_path / "dense")]) == 3
    assert "LlamaForCausalLM has no structured layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--max-tokens", "0"], 3, "--max-tokens 0 must be at least 1"),
        (["--max-tokens", "few"], 3, "invalid int value: 'few'"),
        (["--device", "tpu"], 3, "--device tpu: "),
        (["--dtype", "int8"], 3, "invalid choice: 'int8'"),
        (["--max-token", "1"], 3, "Did you mean '--max-tokens'?"),
    ],
)
def test_wrong_arguments(
    tiny_run, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(tiny_run.path), *arguments]) == code
    assert message in capsys.readouterr().err


def test_other_errors(tiny_run, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "none"]) == 5
    assert "none: no such folder" in capsys.readouterr().err
    cache.write_text("a file")
    assert main(["tune", str(tiny_run.path), "--max-tokens", "1"]) == 6
    assert "cannot write" in capsys.readouterr().err


def test_help_has_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    out = capsys.readouterr().out
    assert "factorlm tune runs/demo_low_rank --dtype bfloat16 --max-tokens 512" in out
    assert "--max-tokens N" in out

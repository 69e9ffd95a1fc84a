from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

import factorlm
from factorlm.cli.main import main
from factorlm.data import open_dataset
from factorlm.eval import evaluate_model
from factorlm.records import EvalRecord


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_on_its_own_data(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    num_records = len(list(tiny_run.records))
    found = evaluate(capsys, tiny_run.path)
    model = factorlm.load(tiny_run.path / "model-best")
    expected = evaluate_model(model, open_dataset(tiny_run.data), context_length=16)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["num_tokens"] == expected.num_tokens
    assert found["perplexity"] == pytest.approx(math.exp(expected.loss), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found["context_length"] == 16
    *_, record = records = list(tiny_run.records)
    assert len(records) == num_records + 1
    assert isinstance(record, EvalRecord)
    assert (record.step, record.num_tokens) == (2, 200)
    assert record.source == f"{tiny_run.data} (validation)"
    assert record.loss == found["loss"]


def test_last_model_is_of_the_last_step(tiny_run) -> None:
    shutil.rmtree(tiny_run.path / "model-best")
    assert main(["eval", str(tiny_run.path)]) == 0
    *_, record = tiny_run.records
    assert isinstance(record, EvalRecord)
    assert (record.step, record.num_tokens) == (3, 300)


def test_a_guided_evaluation_is_never_that_of_the_best_model(tiny_run) -> None:
    """No model folder holds guides, however low their loss."""
    first = next(r for r in tiny_run.records if isinstance(r, EvalRecord))
    tiny_run.records.append(dataclasses.replace(first, loss=0.5, guided=True))
    assert main(["eval", str(tiny_run.path)]) == 0
    *_, record = tiny_run.records
    assert isinstance(record, EvalRecord)
    assert (record.step, record.num_tokens) == (2, 200)


def test_evaluations_of_other_texts_do_not_change_a_comparison(
    tiny_run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tiny_run.path), "--json"]) == 0
    before = capsys.readouterr().out
    assert main(["eval", str(tiny_run.path)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tiny_run.path), "--json"]) == 0
    assert capsys.readouterr().out == before


def test_model_folder_on_raw_text(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_run.path / "model"
    found = evaluate(capsys, model, "--text", tiny_run.text, "--context-length", 32)
    num_bytes = len(tiny_run.text.read_bytes())
    assert found["num_tokens"] == num_bytes
    assert found["source"] == str(tiny_run.text)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_run_on_another_split(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, tiny_run.path, "--data", tiny_run.data, "--split", "train")
    assert found["num_tokens"] == open_dataset(tiny_run.data).split("train").num_tokens - 1


def test_table_and_dtype(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_run.path), "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny_run.path} on {tiny_run.data} (validation)"
    names = [line.split("  ")[1].strip() for line in lines[1:]]
    assert names == ["loss", "perplexity", "bits per byte", "tokens"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--context-length", "65"], 3, "--context-length 65 exceeds the model's"),
        (["--context-length", "0"], 3, "--context-length 0 must be at least 1"),
        (["--batch-size", "0"], 3, "--batch-size 0 must be at least 1"),
        (["--split", "valid"], 4, "no split 'valid'; it has train, validation."),
        (["--text", "none.txt"], 4, "source 'none.txt'"),
        (["--text", "a", "--data", "b"], 3, "not allowed with argument"),
        (["--text", "a", "--split", "train"], 3, "--split train: only with --data"),
        (["--device", "tpu"], 3, "--device tpu: "),
        (["--device", "cuda:99"], 3, "--device cuda:99: "),
        (["--dtype", "int8"], 3, "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(
    tiny_run, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_run.path), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_model_folder_needs_a_text(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_run.path / "model")]) == 3
    assert "is not a run: name a text with --text, or --data" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "none"), "--text", str(tiny_run.text)]) == 5
    assert "none: no such folder" in capsys.readouterr().err

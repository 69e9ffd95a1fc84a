"""``factorlm prepare``: its arguments, messages and exit codes, with torch out of reach."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from factorlm.cli import prepare as command
from factorlm.cli.main import main
from factorlm.data import PrepareConfig, open_dataset

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "datasets"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    return path


def test_the_summary_says_what_there_is(text, tmp_path, capsys):
    arguments = ["prepare", str(text), "-o", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main([*arguments, "--val-fraction", "0.25", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    for number in ("6,750", "2,251", "2,250", "1.000", "vocabulary 257, stored as uint16"):
        assert number in printed
    assert "before" not in printed
    assert main([*arguments, "--val-fraction", "0.25"]) == 0
    assert "was prepared before, with these settings" in capsys.readouterr().out


def test_every_option_reaches_the_config(text, tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"body": f"text {n}"}) + "\n" for n in range(100)) + "{\n")
    code = main(
        ["prepare", str(lines), str(lines), "-o", str(tmp_path / "out"), "--tokenizer", "bpe:300",
         "--val-source", str(lines), "--weights", "1", "0.5", "--text-column", "body",
         "--workers", "1", "--shard-tokens", "50", "--seed", "3"]
    )  # fmt: skip
    assert code == 4
    lines.write_text(lines.read_text().removesuffix("{\n") * 11 + "{\n")
    code = main(
        ["prepare", str(lines), str(lines), "-o", str(tmp_path / "two"), "--tokenizer", "bpe:300",
         "--val-source", str(lines), "--weights", "1", "0.5", "--text-column", "body",
         "--workers", "1", "--shard-tokens", "5000", "--seed", "3", "--tolerant"]
    )  # fmt: skip
    assert code == 0
    dataset = open_dataset(tmp_path / "two")
    assert [stream.weight for stream in dataset.split("train").streams] == [1.0, 0.5]
    assert dataset.split("train").num_documents == 2200
    assert dataset.split("validation").num_documents == 1100
    assert dataset.manifest.extra["rejected"] == {"not JSON": 3}
    config = dataset.manifest.extra["config"]
    assert (config["seed"], config["shard_tokens"], config["text_column"]) == (3, 5000, "body")


def test_every_field_has_an_option():
    names = {field.name for field in dataclasses.fields(PrepareConfig)}
    assert names == {*command._FIELDS, "sources", "output", "tolerant"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.txt"], 4, "source 'missing.txt': no such file"),
        (["{text}", "--tokenizer", "bpe:1"], 3, "bpe:<size> needs a size of at least 257"),
        (["{text}", "--val-fraction", "2"], 3, "val_fraction=2.0 must be in"),
        (["{text}", "--weights", "1", "2"], 3, "weights: 2 for 1 sources"),
        (["{text}", "--val-fractoin", "2"], 3, "Did you mean '--val-fraction'"),
        ([], 3, "SOURCE"),
    ],
)
def test_errors_have_their_codes(text, tmp_path, capsys, arguments, code, message):
    arguments = [argument.format(text=text) for argument in arguments]
    assert main(["prepare", *arguments, "-o", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err


def test_help_shows_sources_examples_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for part in ("python-stdlib -o data/stdlib", "default: 0.1", "hf:name", "67108864", "0.1%"):
        assert part in printed
    assert f"(default: {PrepareConfig.tokenizer})" in " ".join(printed.split())
    assert f"default: {PrepareConfig.shard_tokens}" in printed


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_runs_where_torch_and_transformers_cannot_be_imported(text, tmp_path, tokenizer):
    """The blocker is in ``sitecustomize``, so the worker processes meet it too."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    blocked = [sys.executable, "-c", "import torch"]
    assert subprocess.run(blocked, env=environment, capture_output=True).returncode == 1
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "factorlm", "prepare", str(text), "-o", str(out), "--workers", "2",
         "--tokenizer", tokenizer],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    dataset = open_dataset(out)
    dataset.verify()
    assert dataset.split("train").num_text_bytes == 8100
    code = (
        "from factorlm.data import *; import sys; d = open_dataset(sys.argv[1]);"
        "print(TokenLoader(d, context_length=8, sequences_per_step=2, seed=0).batch(0).shape,"
        "len(EvalWindows(d, context_length=8, batch_size=2)) > 1, d.load_tokenizer().eos_id >= 0)"
    )
    used = subprocess.run(
        [sys.executable, "-c", code, str(out)], env=environment, capture_output=True, text=True
    )
    assert used.stdout == "(2, 9) True True\n", used.stderr


def test_interrupted_by_the_keyboard(text, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("factorlm.data.preparation.build_tokenizer", interrupt)
    arguments = ["prepare", str(text), "-o", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(arguments) == 130
    monkeypatch.undo()
    assert main([*arguments, "--workers", "1"]) == 0
    capsys.readouterr()

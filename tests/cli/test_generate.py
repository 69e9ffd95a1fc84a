from __future__ import annotations

import argparse

import pytest
from torch import nn

import factorlm
from factorlm.cli.generate import add_arguments
from factorlm.cli.main import main
from factorlm.hf import model_folder
from factorlm.inference import (
    PremergeReport,
    Sampling,
    generate_text,
    load_text_tokenizer,
    premerge_,
)
from factorlm.layers import MergePolicy
from factorlm.records import GenerationRecord
from factorlm.report.compare import read_run


def test_run_streams_text_and_records_the_speed(
    tiny_run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "The ", "--max-new-tokens", "12", "--greedy"]
    assert main(["generate", str(tiny_run.path), *arguments]) == 0
    out, err = capsys.readouterr()
    expected = generate_text(
        factorlm.load(tiny_run.path),
        load_text_tokenizer(model_folder(tiny_run.path)),
        "The ",
        max_new_tokens=12,
        sampling=Sampling(greedy=True),
    )
    *_, record = tiny_run.records
    assert isinstance(record, GenerationRecord)
    assert out == f"The {expected.text}\n"
    assert (record.prompt, record.text) == ("The ", expected.text)
    assert (record.num_prompt_tokens, record.num_new_tokens) == (4, expected.num_new_tokens)
    prefill, decode = err.splitlines()[-2:]
    assert record.prefill_seconds is not None
    speed = f"{4 / record.prefill_seconds:,.1f} tokens/s"
    assert prefill == (
        f"prefill: 4 prompt tokens in {1000 * record.prefill_seconds:,.1f} ms, {speed}"
    )
    speed = f"{record.tokens_per_second:,.1f} tokens/s"
    assert decode == f"decode: {record.num_new_tokens} new tokens, {speed}"


def test_several_prompts_are_a_batch_of_the_same_texts(
    tiny_run, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--max-new-tokens", "12", "--greedy"]
    prompts = ["The ", "A longer one", ""]
    texts = []
    for prompt in prompts:
        assert main(["generate", str(tiny_run.path), "--prompt", prompt, *common]) == 0
        texts.append(capsys.readouterr().out)
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert main(["generate", str(tiny_run.path), *given, *common]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"=== {n} of 3 ===\n{text}" for n, text in enumerate(texts, 1))
    assert "prefill: 17 prompt tokens in" in err
    assert "tokens/s in each of 3 texts, " in err
    *_, first, second, third = tiny_run.records
    assert [record.prompt for record in (first, second, third)] == prompts
    assert {record.batch_size for record in (first, second, third)} == {3}


def test_compare_leaves_batches_out(tiny_run) -> None:
    """The speed of a text in a batch is no speed of generation alone."""
    common = ["generate", str(tiny_run.path), "--max-new-tokens", "4", "--prompt", "a"]
    assert main([*common, "--prompt", "b"]) == 0
    assert read_run(tiny_run.path).generation is None
    assert main(common) == 0
    *_, record = tiny_run.records
    assert read_run(tiny_run.path).generation == record


def test_stop_strings_end_the_text(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", str(tiny_run.path), "--prompt", "The", "--max-new-tokens", "12"]
    sample = ["--temperature", "3", "--top-k", "40"]
    assert main([*common, *sample]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    stop = text[6:8]
    assert main([*common, *sample, "--stop", "never", "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: text.index(stop, 3)] + "\n"
    *_, record = tiny_run.records
    assert isinstance(record, GenerationRecord)
    assert record.text == text[3 : text.index(stop, 3)]


def test_stop_takes_line_breaks_as_they_are_typed() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["model", "--stop", r"\n\tx"]).stop == ["\n\tx"]


def test_sampling_flags_reach_the_sampling(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for flags in (
        ["--seed", "1"],
        ["--seed", "1"],
        ["--seed", "2"],
        ["--top-k", "1"],
        ["--greedy"],
    ):
        common = ["--max-new-tokens", "20", "--temperature", "5", "--top-p", "1"]
        assert main(["generate", str(tiny_run.path), *common, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]


def test_merged_copies_change_no_text(
    tiny_run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(model: nn.Module, **_: object) -> PremergeReport:
        return premerge_(model, MergePolicy.always())

    monkeypatch.setattr("factorlm.inference.premerge_", always)
    command = ["generate", str(tiny_run.path), "--prompt", "a", "--greedy", "--max-new-tokens", "6"]
    texts = []
    for flags in ([], ["--no-premerge"]):
        assert main([*command, *flags]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert ("pre-merged: " in captured.err) is (not flags)
    assert texts[0] == texts[1]


def test_model_folder_has_no_records(tiny_run) -> None:
    before = list(tiny_run.records)
    assert main(["generate", str(tiny_run.path / "model"), "--max-new-tokens", "2"]) == 0
    assert list(tiny_run.records) == before
    assert not (tiny_run.path / "model" / "records.jsonl").exists()


def test_compare_shows_the_speed(tiny_run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_run.path), "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["compare", str(tiny_run.path), "--no-plot"]) == 0
    *_, record = tiny_run.records
    assert isinstance(record, GenerationRecord)
    assert f"{record.tokens_per_second:,.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "temperature=0.0 must be above 0"),
        (["--max-new-tokens", "99"], "max_new_tokens=99 after a prompt of 1 tokens exceeds"),
        (["--stop", ""], "--stop must not be empty"),
        (["--max-new-tokens", "few"], "invalid int value: 'few'"),
    ],
)
def test_wrong_arguments(
    tiny_run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny_run.path), *arguments]) == 3
    assert message in capsys.readouterr().err

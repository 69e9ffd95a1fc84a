from __future__ import annotations

import pytest

import factorlm
from factorlm.cli.main import main
from factorlm.hf import model_folder
from factorlm.inference import Sampling, generate_text, load_text_tokenizer
from factorlm.records import GenerationRecord


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
    assert f"{record.tokens_per_second:,.1f} tokens/s" in err


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
        (["--max-new-tokens", "few"], "invalid int value: 'few'"),
    ],
)
def test_wrong_arguments(
    tiny_run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny_run.path), *arguments]) == 3
    assert message in capsys.readouterr().err

"""``make demo`` in small: few steps of tiny models on this repository's own pages."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from factorlm.report import read_run

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--data.source", f'["{ROOT / "docs"}"]', "--data.path", "data/docs"),
    *("--data.tokenizer", "bpe:300", "--data.context_length", "64"),
    *("--model.preset", "gpt_nano", "--model.vocab_size", "300"),
    *("--batch.num_sequences", "4", "--batch.num_steps", "6"),
    *("--eval.every_steps", "3", "--eval.num_tokens", "256"),
]


def demo(overrides: list[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "demo.py"))["main"](overrides)


@pytest.mark.slow
def test_demo_trains_generates_compares_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    demo(SMALL)
    output = capsys.readouterr().out
    dense, low_rank = read_run("runs/demo_dense"), read_run("runs/demo_low_rank_32")
    for run in (dense, low_rank):
        assert run.is_finished
        assert run.generation is not None
        assert run.generation.text in output
    assert low_rank.run.num_ffn_params < dense.run.num_ffn_params
    assert low_rank.num_tokens == dense.num_tokens == 6 * 4 * 64
    for row in (
        "FFN parameters",
        "parameters",
        "training FLOPs",
        "perplexity",
        "training tokens/s",
        "generation tokens/s",
    ):
        assert row in output
    assert Path("runs/demo_loss.png").read_bytes().startswith(b"\x89PNG")

    demo(SMALL)
    again = capsys.readouterr().out
    assert "was prepared before" in again
    assert again.count("is finished") == 2
    assert len(read_run("runs/demo_dense").steps) == 6


@pytest.mark.slow
def test_demo_ends_with_the_exit_code_of_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        demo([*SMALL, "--data.source", '["no_such_folder"]'])
    assert end.value.code == 4


def test_the_demo_compares_like_with_like() -> None:
    """Same shape, data, tokens and schedule: the recipes differ in the structure alone."""
    script = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    dense, low_rank = (script["load_recipe"](recipe) for recipe in script["RECIPES"])
    assert dense.structure == {}
    assert low_rank.structure == {"structure": "low_rank", "param_ratio": 0.32}
    assert low_rank.replace(structure={}, name=dense.name) == dense
    assert dense.data.source == ["python-stdlib"]

"""The commands that README and ``docs/`` show run as they stand, on small runs and little text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zstandard
from tests.pages import ROOT, blocks, page_lines
from tests.report.studies import write_grid, write_ladder

from factorlm.cli.main import main
from factorlm.data import PrepareConfig, prepare

SMALLER = {
    "train": [
        *("--model.preset", "gpt_nano", "--batch.num_steps", "2", "--batch.num_sequences", "2"),
        *("--data.context_length", "32", "--eval.num_tokens", "256"),
    ],
    "tune": ["--max-tokens", "1"],
    "generate": ["--max-new-tokens", "2"],
}
"""Command to what a line is given besides, so that it takes a second."""
NOT_RUN = {
    "torchrun": "several processes: tests/distributed",
    "factorlm bench": "minutes: tests/cli/test_bench.py",
    "factorlm scale plan": "trains to calibrate: tests/cli/test_scale.py",
    "factorlm scale run": "trains a ladder: tests/cli/test_scale.py",
    "factorlm prepare python-stdlib": "reads a whole library: tests/data",
}
"""How a line begins to why it is only parsed, and where it is run instead."""
LINES = {
    f"{page}: {line}": words
    for page, words in [*page_lines("README.md"), *page_lines("docs/")]
    if not (line := " ".join(words)).startswith(tuple(NOT_RUN))
}
OUTPUTS = ("-o", "--output", "--figures")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts, recipes, data and runs that the pages speak of, small."""
    folder = tmp_path_factory.mktemp("world")
    write_texts(folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    first, second, *_ = blocks(ROOT / "docs" / "how-to" / "train-your-own-text.md", "yaml")
    (folder / "recipes" / "my_dense.yaml").write_text(first.text)
    (folder / "recipes" / "my_low_rank.yaml").write_text(second.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for output in ("data/my_text", "data/python-stdlib"):
            prepare(
                PrepareConfig(sources=("prose",), output=output, tokenizer="bpe:512", workers=1)
            )
        for name in ("demo_dense", "demo_low_rank_32", "my_dense", "my_low_rank"):
            assert main(["train", f"recipes/{name}.yaml", *SMALLER["train"]]) == 0
    for model, run in (("my_dense_model", "my_dense"), ("my_structured_model", "my_low_rank")):
        shutil.copytree(folder / "runs" / run / "model", folder / model)
    write_ladder(folder / "runs" / "books")
    write_ladder(folder / "reports" / "ladder" / "records")
    law = lambda params, tokens, flops: 1.7 + 400 * params**-0.34 + 400 * tokens**-0.28  # noqa: E731
    write_grid(folder / "runs" / "iso_flops", law)
    for topic in ("demo", "quality", "speed"):
        (folder / "reports" / topic).symlink_to(ROOT / "reports" / topic)
    return folder


def write_texts(folder: Path) -> None:
    """This project's own pages, as every kind of source that a line names."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in ("prose", "code", "my_text"):
        (folder / name).mkdir()
        (folder / name / "pages.md").write_text(text)
    for name in ("book.txt", "another_book.txt", "my_text/held_out.txt"):
        (folder / name).write_text(text[:4000])
    lines = "".join(json.dumps({"text": page.read_text("utf-8")}) + "\n" for page in pages)
    for name in ("train", "validation"):
        packed = zstandard.compress(lines.encode())
        (folder / "my_text" / f"{name}.jsonl.zst").write_bytes(packed)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_command_runs(
    line: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a copy of the world, where what it makes is not there before."""
    shutil.copytree(world, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path / "cache"))
    _, command, *_ = words = LINES[line]
    made = [Path(words[place + 1]) for place, word in enumerate(words) if word in OUTPUTS]
    for path in made:
        shutil.rmtree(path, ignore_errors=True)
    if command == "train":
        shutil.rmtree("runs")
    assert main([*words[1:], *SMALLER.get(command, [])]) == 0
    found = capsys.readouterr()
    assert found.out or found.err
    assert all(path.stat().st_size for path in made)


def test_what_is_not_run_is_on_a_page() -> None:
    lines = [" ".join(words) for _, words in page_lines()]
    assert all(any(line.startswith(start) for line in lines) for start in NOT_RUN)
    assert len(LINES) > 30

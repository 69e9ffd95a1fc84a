from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from factorlm.cli._fields import fields_help
from factorlm.cli.main import main
from factorlm.config import Config, field_names
from factorlm.train.config import TrainConfig

RECIPE = """\
model: {{preset: gpt_nano, vocab_size: 257}}
data: {{path: {data}, context_length: 32}}
batch: {{num_sequences: 2, num_steps: 3}}
"""


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    """An inner thing.

    More about it.
    """

    kind: Literal["a", "b"] = "a"
    """Which ``kind``, over
    two lines."""
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    """An outer thing."""

    name: str
    inner: Inner = field(default_factory=Inner)
    numbers: list[float] = field(default_factory=lambda: [0.5])
    """Some."""


def test_fields_with_types_defaults_and_meanings() -> None:
    assert fields_help(Outer).splitlines() == [
        "  --name  str (required)",
        "  --numbers  list[float] = [0.5]",
        "      Some.",
        "",
        "inner: An inner thing.",
        "  --inner.kind  a | b = a",
        "      Which kind, over two lines.",
        "  --inner.size  int | null = null",
    ]


def test_help_lists_every_field_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    sections = {f.name for f in dataclasses.fields(TrainConfig) if f"\n{f.name}: " in text}
    fields = set(field_names(TrainConfig)) - sections
    assert len(sections) == 12
    assert all(f"  --{name}  " in text for name in fields)


@pytest.fixture
def recipe(tiny_run, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(data=tiny_run.data))
    return path


def test_dry_run_describes_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "new"
    assert main(["train", str(recipe), "--dry-run", "--runs-dir", str(runs)]) == 0
    described = capsys.readouterr().out
    assert main(["describe", str(recipe)]) == 0
    assert described == capsys.readouterr().out
    assert not runs.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch.num_step", "4"], "Did you mean 'batch.num_steps'?"),
        (["--batch.num_steps", "0"], "batch.num_steps=0 must be at least 1"),
        (["--batch.num_steps", "many"], "batch.num_steps"),
        (["--structure", "{structure: low_rnk}"], "low_rnk"),
        (["--optimizer.learning_rate"], "optimizer.learning_rate"),
    ],
)
def test_wrong_recipes_name_the_field(
    recipe: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *flags, "--dry-run"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("factorlm train: error: ")
    assert message in error


def test_dry_run_looks_at_the_data_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run", "--data.path", "nowhere"]) == 4
    assert "data.path='nowhere' holds no prepared data" in capsys.readouterr().err
    assert main(["train", str(recipe), "--dry-run", "--model.vocab_size", "200"]) == 3
    assert "model.vocab_size=200" in capsys.readouterr().err


def test_trains_once_and_says_so_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe), "--runs-dir", str(tmp_path / "new"), "--name", "one"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'one'} is finished: 3 steps are done\n"
    assert main([*command, "--seed", "1"]) == 3
    assert "seed=1, was 0" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "new" / "one"), "--max-new-tokens", "3"]) == 0
    assert main(["eval", str(tmp_path / "new" / "one")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "new" / "one"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["is_finished"]
    assert found["num_tokens"] == 3 * 2 * 32
    assert found["generation_tokens_per_second"] > 0


def test_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 3
    assert "none.yaml" in capsys.readouterr().err

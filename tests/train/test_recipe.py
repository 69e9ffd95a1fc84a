"""Recipes: strict reading, ``extends``, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.errors import ConfigError
from factorlm.train import TrainConfig, load_recipe

BASE = """
model: {preset: gpt_tiny, vocab_size: 300}
structure: {structure: low_rank, rank: 8}
optimizer: {learning_rate: 1e-3}
batch: {num_sequences: 4, num_steps: 10}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(base: Path, text: str, name: str = "run.yaml") -> Path:
    path = base.with_name(name)
    path.write_text(text)
    return path


def test_a_recipe_is_named_after_its_file_and_reads_numbers(base: Path) -> None:
    config = load_recipe(base)
    assert config.name == "base"
    assert config.optimizer.learning_rate == 1e-3
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_extends_states_only_what_differs(base: Path) -> None:
    config = load_recipe(write(base, "extends: base.yaml\nbatch: {num_steps: 20}\n"))
    assert (config.name, config.batch.num_steps, config.batch.num_sequences) == ("run", 20, 4)
    assert config.structure == {"structure": "low_rank", "rank": 8}


def test_another_structure_does_not_inherit_fields(base: Path) -> None:
    text = "extends: base.yaml\nstructure: {structure: block_shuffle, num_blocks: 2}\n"
    assert load_recipe(write(base, text)).structure == {
        "structure": "block_shuffle",
        "num_blocks": 2,
    }


def test_a_merged_key_is_not_a_repeated_one(base: Path) -> None:
    text = "extends: base.yaml\nmodel: &m {<<: {vocab_size: 400}, vocab_size: 500}\n"
    assert load_recipe(write(base, text)).model.vocab_size == 500


def test_flags_win_over_the_file(base: Path) -> None:
    config = load_recipe(base, ["--structure.rank", "4", "--name", "other", "--seed=3"])
    assert (config.structure["rank"], config.name, config.seed) == (4, "other", 3)


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("optimizer: {learning_rat: 1}", [], ["optimizer.learning_rat", "optimizer.learning_rate"]),
        ("optimiser: {learning_rate: 1}", [], ["optimiser", "optimizer"]),
        ("batch: {num_steps: many}", [], ["batch.num_steps", "many"]),
        ("batch: {num_steps: 0}", [], ["batch.num_steps=0", "at least 1"]),
        ("batch: {num_tokens: 10000}", [], ["batch.num_steps=10", "batch.num_tokens=10000"]),
        ("optimizer: {betas: [0.9, 1.5]}", [], ["optimizer.betas", "1.5"]),
        ("schedule: {kind: wsd, warmup_ratio: 0.9, decay_ratio: 0.9}", [], ["decay_ratio"]),
        ("model: {init_from: x}", [], ["model.preset='gpt_tiny'", "model.init_from='x'"]),
        ("name: a/b", [], ["name='a/b'"]),
        ("extends: none.yaml", [], ["none.yaml", "No such file"]),
        ("extends: run.yaml", [], ["extends itself"]),
        ("- a list", [], ["must be a mapping"]),
        ("a: [", [], ["not YAML"]),
        ("model:\nseed: 1\nmodel: {}", [], ["run.yaml", "line 4", "'model'"]),
        ("model: {overrides: {a: 1, a: 2}}", [], ["run.yaml", "line 2", "'a'"]),
        ("", ["--batch.num_stepz", "3"], ["batch.num_stepz", "batch.num_steps"]),
        ("", ["--checkpoint.keep", "1"], ["checkpoint.keep=1", "at least 2"]),
    ],
)
def test_a_bad_recipe_names_the_file_the_field_and_the_rule(
    base: Path, text: str, flags: list[str], words: list[str]
) -> None:
    head = "" if text.startswith(("extends", "- ", "a: [")) else "extends: base.yaml\n"
    with pytest.raises(ConfigError) as error:
        load_recipe(write(base, head + text), flags)
    for word in ["yaml", *words]:
        assert word in str(error.value)

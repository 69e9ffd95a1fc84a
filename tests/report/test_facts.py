from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from factorlm.report import read_run
from factorlm.report.facts import (
    differences,
    hardware_label,
    recipe_file,
    recipe_yaml,
    reproduce_commands,
)
from factorlm.train.config import TrainConfig
from factorlm.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environment", "label"),
    [
        ({}, ""),
        ({"cpu": "Abacus", "num_threads": 1, "num_processes": 1}, "Abacus, 1 thread"),
        (
            {"cpu": "A", "cpu_capability": "AVX2", "num_threads": 2, "num_processes": 4},
            "A AVX2, 2 threads, 4 processes",
        ),
        ({"cpu": "A", "gpu": "H100", "num_processes": 8}, "8 x H100"),
        ({"cpu": "A", "gpu": "H100"}, "H100"),
    ],
)
def test_hardware_label(environment: dict[str, Any], label: str) -> None:
    assert hardware_label(environment) == label


def test_differences_are_of_fields_at_any_depth() -> None:
    found = differences(
        [
            {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {}},
            {"a": 1, "b": {"c": [1, 3], "d": None}, "e": {"f": True}},
        ]
    )
    assert found == {"b.c": ["[1, 2]", "[1, 3]"], "e.f": ["–", "true"]}
    assert differences([{"a": 1}]) == {}


def test_the_recipe_is_the_one_that_ran(write_run, tmp_path: Path) -> None:
    """What the page says to save and run is read as the very recipe of the record."""
    config = load_recipe(ROOT / "recipes" / "demo_low_rank_32.yaml", [])
    run = read_run(write_run(**config.to_dict())).run
    path = tmp_path / recipe_file(run)
    path.write_text(recipe_yaml(run), encoding="utf-8")
    assert load_recipe(path, []) == config
    assert reproduce_commands(run) == [
        "git checkout c0ffee",
        "factorlm train demo_low_rank_32.yaml",
    ]


def test_committed_records_can_be_run_again() -> None:
    path = ROOT / "reports" / "quality" / "records" / "wide_h128-G-s0.jsonl"
    run = read_run(path).run
    config = TrainConfig.from_dict(yaml.safe_load(recipe_yaml(run)))
    assert config.to_dict() == {"labels": {}} | run.config  # older than labels


def test_commands_of_many_processes_without_a_commit(write_run) -> None:
    run = read_run(write_run("a", environment={"num_processes": 4})).run
    assert reproduce_commands(run) == ["torchrun --nproc-per-node 4 -m factorlm train a.yaml"]


@pytest.mark.parametrize("name", ["../x; rm -rf ~", "a b", "-rf", "$(id)", "ä<script>"])
def test_no_name_is_more_than_one_word_of_a_shell(name: str, write_run) -> None:
    environment = {"commit": name + "-dirty"}
    run = read_run(write_run(name, environment=environment)).run
    checkout, train = reproduce_commands(run)
    assert shlex.split(checkout) == ["git", "checkout", name]
    assert shlex.split(train) == ["factorlm", "train", recipe_file(run)]
    assert "/" not in recipe_file(run)
    assert recipe_file(run)[0] not in ".-"

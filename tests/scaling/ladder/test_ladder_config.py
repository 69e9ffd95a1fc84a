"""The ladder's file, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.scaling.ladder.conftest import size_sections

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import LadderFile, load_ladder
from factorlm.scaling.ladder.plan import Plan

TUNE = {"rule": "tune", "values": [1e-3, 2e-3, 4e-3], "sizes": ["a"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"familys": {"dense": {}}}, r"toy\.yaml: unknown key 'familys'.*families"),
        ({"sizes": {}}, "sizes={} must name at least one size"),
        ({"families": {}}, "families={} must name at least one family"),
        ({"seeds": 0}, r"seeds=\[0\] must be at least 1"),
        ({"seeds_by_size": {"bb": 2}}, "seeds_by_size names an unknown size 'bb'; known: a, b, c"),
        ({"rate": TUNE | {"sizes": ["d"]}}, r"rate\.sizes names an unknown size 'd'"),
        ({"rate": TUNE | {"values": [1e-3, 2e-3]}}, "must be at least three rates, finite"),
        ({"rate": TUNE | {"values": [1e-3, 2e-3, math.inf]}}, "must be at least three rates"),
        ({"rate": TUNE | {"values": [1e-3, 2e-3, 3e-3, 3e-3]}}, "above 0, each once"),
        ({"rate": TUNE | {"sizes": ["a", "a"]}}, "must name each size once"),
        ({"tokens": {"per_parameter": math.inf}}, "per_parameter=inf must be finite and above 0"),
        ({"tokens": {"rule": "iso_flops", "flops": [math.inf]}}, "a list of finite numbers"),
        ({"executor": ["local"]}, r"executor=\['local'\] must be a mapping of fields"),
        ({"families": {"dense": None}}, r"families\.dense=None must be sections of a recipe"),
        ({"sizes": {64: {}}}, r"sizes\.64: a name is a text; write it in quotes, '64'"),
        ({"rate": TUNE | {"token_share": 1.5}}, r"rate\.token_share=1\.5 must lie in \(0, 1\]"),
        ({"rate": {"values": [1e-3, 2e-3, 3e-3]}}, "'tune' states both values and sizes"),
        ({"tokens": {"rule": "fixed"}}, r"tokens\.num_tokens=None is for tokens\.rule='fixed'"),
        ({"tokens": {"num_tokens": 9}}, r"tokens\.num_tokens=9 is for tokens\.rule='fixed'"),
        ({"tokens": {"rule": "iso_flops"}}, r"tokens\.flops=\[\] is for tokens\.rule='iso_flops'"),
        (
            {"tokens": {"per_parameter": 0}},
            r"tokens\.per_parameter=0\.0 must be finite and above 0",
        ),
        ({"executor": {"workers": 0}}, r"executor\.workers=0 must be at least 1"),
        ({"executor": {"gpus": 2}}, r"executor\.gpus=2 must be 0 or 1"),
        ({"families": {"x": {"seed": 3}}}, r"families\.x\.seed is stated by the ladder itself"),
        (
            {"families": {"x": {"sizes": {"q": {}}}}},
            r"families\.x\.sizes names an unknown size 'q'",
        ),
        ({"families": {"x": 3}}, "families"),
        ({"name": "a/b"}, "name='a/b' must be a plain folder name"),
    ],
)
def test_wrong_fields_are_named(
    write_ladder: Callable[..., Path], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ladder(write_ladder(**fields))


def test_a_wrong_recipe_section_names_the_run(ladder: Callable[..., LadderFile]) -> None:
    file = ladder(families={"x": {"optimizer": {"learnin_rate": 1}}})
    with pytest.raises(
        ConfigError, match=r"ladder toy, run r: unknown key 'optimizer\.learnin_rate"
    ):
        file.config("r", "a", "x", {})


def test_a_missing_part_or_recipe_is_named(write_ladder: Callable[..., Path]) -> None:
    path = write_ladder()
    path.with_name("recipe.yaml").unlink()
    with pytest.raises(ConfigError, match=r"recipe .*recipe\.yaml: No such file"):
        load_ladder(path)
    path.write_text("name: x\n")
    with pytest.raises(ConfigError, match="recipe, sizes, families must be stated"):
        load_ladder(path)


def test_a_family_states_sizes_otherwise(ladder: Callable[..., LadderFile]) -> None:
    wide = {"optimizer": {"kind": "muon"}, "sizes": {"b": size_sections(32)}}
    file = ladder(families={"wide": wide})
    widths = {}
    for size in "ab":
        config = file.config("r", size, "wide", {})
        assert config.optimizer.kind == "muon"
        widths[size] = config.model.overrides["hidden_size"]
    assert widths == {"a": 8, "b": 32}


def test_a_structured_family_has_the_default_guide_unless_one_is_stated(
    ladder: Callable[..., LadderFile],
) -> None:
    """In the words of the runs' records, which a ladder that goes on is compared with."""
    path = ladder(tokens={"rule": "fixed", "num_tokens": 200 * 128}, sizes={"b": size_sections(16)})
    base = {key: value for key, value in path.base.items() if key != "guide"}
    unstated = LadderFile(path.ladder, base)
    for file, variant in ((path, "none"), (unstated, "full")):
        runs = {run.family: run.config for run in Plan(file).runs({})}
        assert runs["low_rank"].guide.variant == variant
        assert runs["dense"].guide.variant == "none"
    assert runs["low_rank"].budget.flops == "dense"

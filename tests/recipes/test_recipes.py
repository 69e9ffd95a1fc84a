"""Every recipe in ``recipes/`` is read, built on the meta device, and described."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from factorlm.data.sources import open_source
from factorlm.layers import STRUCTURES, StructuredLinear
from factorlm.train.assemble import build_model
from factorlm.train.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "ladders")
RECIPES = [path for path in FILES if not path.name.startswith("_")]


def names(paths):
    return [str(path.relative_to(FOLDER)) for path in paths]


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_builds_on_meta_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = build_model(load_recipe(path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    structured = [m for m in model.modules() if isinstance(m, StructuredLinear)]
    assert len(structured) == (0 if report is None else len(report.rows))


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_says_where_its_data_comes_from(path):
    data = load_recipe(path).data
    assert data.path
    assert data.source
    assert data.tokenizer
    for spec in data.source:
        if spec.startswith("hf:"):
            assert open_source(spec).parts[0].size is None, "not read as a dataset of the Hub"
        elif not spec.endswith((".txt", ".parquet")):  # a user's own file
            assert open_source(spec).parts


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_is_named_after_what_it_holds(path):
    """A name that holds a structure, a share or a guide tells the truth."""
    config = load_recipe(path)
    assert config.name == path.stem
    named = [kind for kind in STRUCTURES if kind in path.stem]
    if named:
        expected = max(named, key=len)
        assert config.structure.get("structure", "dense") == expected
    for share in {"32", "63"} & {*path.stem.split("_")}:
        _, report = build_model(config)
        assert report.param_ratio == pytest.approx(int(share) / 100, abs=0.06)
    assert (config.guide.variant != "none") == path.stem.endswith("_guided")
    if path.stem.endswith("_control"):
        other = load_recipe(path.with_stem(path.stem.replace("_control", "_guided")))
        assert other.budget == config.budget
        assert config.budget.flops is not None


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_states_only_what_differs_from_its_base(path):
    values = yaml.safe_load(path.read_text())
    base = values.get("extends")
    if base is not None and not base.startswith("_"):
        inherited = flatten(load_recipe(path.parent / base).to_dict())
        repeated = {k for k, v in flatten(values).items() if k in inherited and inherited[k] == v}
        assert not repeated


def flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "structure"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat

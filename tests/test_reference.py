"""Tables of the reference pages agree with the code that they describe."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import yaml

from factorlm import errors
from factorlm.config import plain
from factorlm.hf import SIZES, build_causal_lm
from factorlm.layers import STRUCTURES, LowRankConfig
from factorlm.records import RECORD_TYPES
from factorlm.surgery import read_block
from factorlm.train.config import TrainConfig
from factorlm.train.run import MAY_CHANGE

DOCS = Path(__file__).parents[1] / "docs"


def read(page: str, section: str = "") -> str:
    """A page, or what stands between ``<!-- section -->`` and ``<!-- end -->`` on it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {section} -->")[1].split("<!-- end -->")[0] if section else text


def cells(text: str) -> list[list[str]]:
    """Rows of tables whose first cell is code."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row.strip("| ").split(" |")] for row in rows]


def recipe_fields() -> dict[str, object]:
    """Dotted name -> default, for every field that has one."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(TrainConfig):
        if field.default_factory is dataclasses.MISSING:
            found[field.name] = field.default
        elif dataclasses.is_dataclass(field.default_factory):
            section = field.default_factory()
            values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
            found |= {f"{field.name}.{key}": plain(value) for key, value in values.items()}
        elif field.name != "structure":  # which has tables of its own
            found[field.name] = field.default_factory()
    return found


def test_reference_of_recipes_has_every_field_with_its_default() -> None:
    rows = {row[0].strip("`"): row[1].strip("`") for row in cells(read("reference/recipes.md"))}
    documented = {name: text for name, text in rows.items() if not name.startswith("structure.")}
    expected = recipe_fields()
    assert documented.keys() == expected.keys()
    assert documented.pop("name") == "the file's name"
    for name, text in documented.items():
        value = float(text) if re.fullmatch(r"\de-\d", text) else yaml.safe_load(text)
        assert value == expected[name], name


def test_reference_of_recipes_names_the_sizes() -> None:
    names = set(re.findall(r"`(\w+)`", read("reference/recipes.md", "presets")))
    assert names == {"gpt_", "llama_", *SIZES}


def test_fields_that_a_resumed_run_may_change() -> None:
    part = read("concepts/runs.md", "fields that may change")
    assert set(re.findall(r"`([\w.]+)`", part)) == set(MAY_CHANGE)


def test_exit_codes() -> None:
    table = read("concepts/runs.md")
    rows = re.findall(r"^\| (\d+) \|.*\| `(\w+)` \|$", table, flags=re.MULTILINE)
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    expected = {e.__name__: e.exit_code for e in classes if issubclass(e, errors.FactorlmError)}
    assert {name: int(code) for code, name in rows} == expected


def test_records() -> None:
    rows = {row[0].strip("`"): row[2] for row in cells(read("reference/files.md", "records"))}
    assert rows.keys() == set(RECORD_TYPES)
    for name, text in rows.items():
        fields = [field.name for field in dataclasses.fields(RECORD_TYPES[name])]
        assert re.findall(r"`(\w+)`", text) == fields


def test_names_of_factors() -> None:
    rows = cells(read("reference/files.md", "factors"))
    shipped = {kind for kind in STRUCTURES if STRUCTURES[kind].__module__.startswith("factorlm.")}
    assert {row[0].strip("`") for row in rows} == shipped
    for kind, names in rows:
        config = STRUCTURES[kind.strip("`")]().for_param_ratio(8, 8, 0.5)
        assert [f"`{factor.name}`" for factor in config.factors(8, 8)] == names.split(", ")


def test_block_of_a_model_folder() -> None:
    (block,) = re.findall(r"^```json\n(.*?)^```", read("reference/files.md"), re.S | re.M)
    shown = json.loads(f"{{{block}}}")["quantization_config"]
    read_block(shown)
    model = build_causal_lm("gpt_nano", LowRankConfig(rank=16), device="meta")
    written = plain(model.config.quantization_config)
    name = "model.layers.1.mlp.c_fc"
    assert shown == written | {"targets": {name: written["targets"][name]}}

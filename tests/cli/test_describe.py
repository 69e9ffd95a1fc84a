"""``factorlm describe``."""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from factorlm.cli import describe
from factorlm.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "recipes" / "papers"


def run(*arguments):
    parser = argparse.ArgumentParser()
    describe.add_arguments(parser)
    args, extra = parser.parse_known_args([str(argument) for argument in arguments])
    return describe.run(args, extra)


def test_json_has_every_number(capsys):
    assert run(PAPERS / "m_low_rank_32.yaml", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["name"] == "m_low_rank_32"
    assert values["num_weight_params"] == 202_113_024
    assert values["num_params"] - values["num_weight_params"] == (
        values["num_params_by_part"]["norm"] + values["num_params_by_part"]["bias"]
    )
    assert values["num_params"] == sum(values["num_params_by_part"].values())
    assert values["forward_flops_per_token"] == sum(
        values["forward_flops_per_token_by_part"].values()
    )
    assert values["num_tokens"] == 12779 * 512 * 1024
    assert values["training_flops"] == 3 * values["forward_flops_per_token"] * values["num_tokens"]
    assert values["memory"]["weights_bytes"] == 4 * values["num_params"]
    assert values["swaps"]["num_layers"] == 46
    assert [group["num_layers"] for group in values["swaps"]["groups"]] == [23, 23]
    assert values["swaps"]["param_ratio"] == 0.3125


def test_a_dense_model_has_no_swaps(capsys):
    run(PAPERS / "s_dense.yaml", "--json")
    values = json.loads(capsys.readouterr().out)
    assert values["structure"] == {}
    assert values["swaps"] is None


def test_every_json_key_is_documented(capsys):
    run(PAPERS / "s_low_rank_32.yaml", "--json")
    values = json.loads(capsys.readouterr().out)
    page = (ROOT / "docs" / "reference" / "describe.md").read_text()
    documented = set(re.findall(r"^\| `([\w.]+)`", page, flags=re.MULTILINE))
    keys = {*values}
    for section in ("num_params_by_part", "forward_flops_per_token_by_part", "memory", "swaps"):
        keys |= {f"{section}.{key}" for key in values[section]}
    keys |= {f"swaps.groups.{key}" for key in values["swaps"]["groups"][0]}
    assert documented == keys


def test_overrides_change_what_is_described(capsys):
    run(
        PAPERS / "s_low_rank_32.yaml",
        "--json",
        "--structure.rank",
        384,
        "--batch.num_tokens",
        10**7,
    )
    values = json.loads(capsys.readouterr().out)
    assert values["num_ffn_params"] == 37_158_912
    assert values["num_steps"] == 19


def test_recomputed_activations_cost_flops_and_save_memory(capsys):
    flag = "--parallel.activation_checkpointing"
    described = []
    for value in ("false", "true"):
        run(PAPERS / "s_low_rank_32.yaml", "--json", flag, value)
        described.append(json.loads(capsys.readouterr().out))
    plain, recomputed = described
    parts = plain["forward_flops_per_token_by_part"]
    again = parts["attention_projections"] + parts["attention_scores"] + parts["ffn"]
    assert plain["executed_training_flops"] == plain["training_flops"]
    assert recomputed["training_flops"] == plain["training_flops"]
    extra = recomputed["executed_training_flops"] - plain["training_flops"]
    assert extra == again * plain["num_tokens"]
    saved = [values["memory"]["activations_bytes"] for values in (plain, recomputed)]
    assert saved[1] < saved[0] / 5


def test_the_table_shows_the_same_numbers(capsys):
    run(PAPERS / "s_low_rank_32.yaml")
    text = capsys.readouterr().out
    for number in ("73,947,648", "73,826,304", "20,938,752", "1.224e+18", "4,196", "31.25%"):
        assert number in text, number


def test_a_guided_run_says_which_steps_are_guided_and_replayed(capsys):
    run(PAPERS / "s_low_rank_32_guided.yaml", "--json")
    values = json.loads(capsys.readouterr().out)
    steps = [values[f"num_{name}steps"] for name in ("", "original_", "guide_")]
    assert steps == [5458, 4196, 1262]
    assert values["num_tokens"] == 5458 * 512 * 1024
    assert values["executed_training_flops"] < values["training_flops"], "guides are merged"
    run(PAPERS / "s_low_rank_32_guided.yaml")
    rows = [re.split(r"\s*[│┃]\s*", line) for line in capsys.readouterr().out.splitlines()]
    shown = {row[1]: row[2] for row in rows if len(row) == 4}
    assert (shown["steps"], shown["with a guide"]) == ("5,458", "1,262")
    assert shown["on tokens seen before"] == "1,262"


@pytest.mark.parametrize("recipe", ["s_low_rank_32", "s_low_rank_32_control"])
def test_a_run_without_a_guide_has_no_row_of_guided_steps(recipe, capsys):
    run(PAPERS / f"{recipe}.yaml")
    text = capsys.readouterr().out
    assert "with a guide" not in text
    assert "seen before" not in text
    run(PAPERS / f"{recipe}.yaml", "--json")
    values = json.loads(capsys.readouterr().out)
    assert (values["num_original_steps"], values["num_guide_steps"]) == (4196, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--structure.rnak", "3"], "unknown key 'structure.rnak'. Did you mean 'rank'"),
        (["--structure.rank", "9999"], "structure: .*rank=9999 exceeds"),
        (["--structure.structure", "lowrank"], "unknown structure 'lowrank'.*'low_rank'"),
        (["--model.preset", "gpt_z"], "model: .*gpt_z.*'gpt_s'"),
        (["--model.overrides", "{hidden_sise: 3}"], "'hidden_sise' is not a field.*'hidden_size'"),
        (["--btch.num_tokens", "3"], "unknown key 'btch.num_tokens'.*'batch.num_tokens'"),
        (["--batch.num_steps", "5"], "batch.num_steps=5 and batch.num_tokens=.*exactly one"),
        (["--batch.num_tokens", "null"], "batch.num_steps=None and .*exactly one"),
        (["--data.context_length", "4096"], "data.context_length=4096 exceeds"),
    ],
)
def test_a_bad_recipe_names_field_and_nearest_key(override, message):
    with pytest.raises(ConfigError, match=message):
        run(PAPERS / "s_low_rank_32.yaml", *override)


def test_a_missing_recipe_is_named():
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        run("nothing.yaml")


@pytest.mark.slow
def test_xl_needs_no_memory_for_its_weights():
    """743M parameters are 3 GB; the process may use 1.5 GB for torch and transformers."""
    code = (
        "import argparse\n"
        "from factorlm.cli import describe\n"
        f"args = argparse.Namespace(recipe={str(PAPERS / 'xl_low_rank_32.yaml')!r}, json=True)\n"
        "describe.run(args, [])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib * 1024 < 1.5e9


def test_importing_the_command_imports_no_torch():
    code = "import sys, factorlm.cli.describe; assert not {'torch', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

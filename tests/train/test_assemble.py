"""The model that a recipe builds."""

from __future__ import annotations

import pytest
import torch

from factorlm.errors import ConfigError
from factorlm.hf import build_causal_lm
from factorlm.layers import BlockShuffleConfig, DenseConfig, LowRankConfig, StructuredLinear
from factorlm.train.assemble import build_model
from factorlm.train.config import TrainConfig


def recipe(structure=None, context_length=16, **model):
    model = {"preset": "gpt_nano", "vocab_size": 99} | model
    return TrainConfig.from_dict(
        {
            "name": "test",
            "seed": 3,
            "model": model,
            "structure": structure or {},
            "data": {"context_length": context_length},
            "batch": {"num_steps": 1},
        }
    )


def structures(model):
    return {n: m.config for n, m in model.named_modules() if isinstance(m, StructuredLinear)}


LOW_RANK = {"structure": "low_rank", "rank": 8}


def test_on_meta_nothing_is_allocated():
    model, report = build_model(recipe(LOW_RANK))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(report.rows) == 10


def test_a_dense_recipe_has_no_report():
    model, report = build_model(recipe())
    assert report is None
    assert not structures(model)


@pytest.mark.parametrize("structure", [{}, LOW_RANK])
def test_weights_are_those_of_build_causal_lm(structure):
    model, _ = build_model(recipe(structure), device="cpu")
    config = LowRankConfig(rank=8) if structure else None
    expected = build_causal_lm("gpt_nano", config, vocab_size=99, seed=3).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_described_is_what_is_built(device):
    section = {"structure": "block_dense", "num_blocks": 2, "param_ratio": 0.5, "multiple_of": 4}
    model, report = build_model(recipe(section), device=device)
    assert {(c.num_blocks, c.rank % 4) for c in structures(model).values()} == {(2, 0)}
    assert report.param_ratio == pytest.approx(0.5, abs=0.05)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(p.shape) for name, p in build_model(recipe(section))[0].named_parameters()
    }


def test_the_first_layer_can_be_structured_too():
    model, _ = build_model(recipe(LOW_RANK | {"keep_first_dense": False}))
    assert len(structures(model)) == 12


def test_layers_give_one_structure_each():
    section = {
        "layers": {
            "*.3.mlp.c_fc": LOW_RANK,
            "*.4.mlp.*": {"structure": "block_shuffle", "num_blocks": 4},
            "*.5.mlp.*": None,
        }
    }
    found = structures(build_model(recipe(section))[0])
    assert found == {
        "model.layers.3.mlp.c_fc": LowRankConfig(rank=8),
        "model.layers.4.mlp.c_fc": BlockShuffleConfig(num_blocks=4),
        "model.layers.4.mlp.c_proj": BlockShuffleConfig(num_blocks=4),
    }


def test_overrides_and_vocabulary_reach_the_model():
    model, _ = build_model(recipe(overrides={"num_hidden_layers": 2}, vocab_size=50))
    assert len(model.model.layers) == 2
    assert model.get_input_embeddings().weight.shape == (50, 64)


@pytest.fixture
def folder(tmp_path):
    saved = build_causal_lm("gpt_nano", vocab_size=77, seed=9)
    saved.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def from_folder(folder, structure=None, **model):
    return recipe(structure, preset=None, init_from=str(folder), **model)


def test_init_from_loads_the_weights(folder):
    model, report = build_model(from_folder(folder), device="cpu")
    expected = build_causal_lm("gpt_nano", vocab_size=77, seed=9).state_dict()
    assert report is None
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_init_from_projects_the_weights(folder):
    full = {"structure": "low_rank", "rank": 64}
    model, report = build_model(from_folder(folder, full), device="cpu")
    dense = build_causal_lm("gpt_nano", vocab_size=77, seed=9)
    for row in report.rows:
        weight = dense.get_submodule(row.name).weight
        assert model.get_submodule(row.name).relative_error(weight) < 1e-5


def test_init_from_on_meta_is_the_architecture_alone(folder):
    (folder / "model.safetensors").unlink()
    model, report = build_model(from_folder(folder, LOW_RANK))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.config.vocab_size == 77
    assert len(report.rows) == 10


def test_a_structured_model_keeps_its_structure(tmp_path):
    build_causal_lm("gpt_nano", LowRankConfig(rank=8), vocab_size=77).save_pretrained(tmp_path)
    for device in ("meta", "cpu"):
        model, report = build_model(from_folder(tmp_path), device=device)
        assert report is None
        assert len(structures(model)) == 10
    with pytest.raises(ConfigError, match="structure: the model is structured already"):
        build_model(from_folder(tmp_path, LOW_RANK), device="cpu")


def test_a_loaded_architecture_cannot_be_overridden(folder):
    config = from_folder(folder, overrides={"num_hidden_layers": 2})
    with pytest.raises(ConfigError, match=r"model\.overrides=.*model\.init_from"):
        build_model(config, device="cpu")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (LOW_RANK | {"rnak": 3}, "unknown key 'structure.rnak'. Did you mean 'rank'?"),
        (LOW_RANK | {"param_raito": 0.3}, "'structure.param_raito'. Did you mean 'param_ratio'?"),
        ({"structure": "low_rnak"}, "structure: unknown structure 'low_rnak'.*'low_rank'"),
        ({"structure": 3}, "structure.structure=3 must name one of"),
        (LOW_RANK | {"rank": "many"}, "structure: .*rank"),
        (LOW_RANK | {"rank": 999}, "structure: model.layers.1.mlp.c_fc: rank=999 exceeds"),
        ({"structure": "low_rank"}, "structure: .*rank=None"),
        ({"structure": "low_rank", "param_ratio": "half"}, "structure.param_ratio='half' must be"),
        ({"structure": "low_rank", "param_ratio": True}, "structure.param_ratio=True must be"),
        (LOW_RANK | {"keep_first_dense": 1}, "structure.keep_first_dense=1 must be of type bool"),
        (LOW_RANK | {"multiple_of": 8}, "structure: multiple_of=8 .* needs param_ratio"),
        ({"param_ratio": 0.5}, "structure.structure=None must name one of"),
        ({"rank": 3}, "structure.structure=None must name one of .*low_rank"),
        (LOW_RANK | {"layers": {"*": None}}, "structure.layers stands alone"),
        ({"structure": [1], "layers": {"*": None}}, r"structure.structure=\[1\] must name one of"),
        ({"layers": 3}, "structure.layers=3 must be of type dict"),
        ({"layers": {}, "rank": 3}, "unknown key 'structure.rank'"),
        ({"layers": {"*.mlp.c_fx": LOW_RANK}}, r"structure: .*'\*.mlp.c_fx' matches no linear"),
        ({"structure": "block_shuffle", "num_blocks": 3}, "structure: .*num_blocks=3 does not"),
    ],
)
def test_a_bad_section_names_key_value_and_rule(section, message):
    with pytest.raises(ConfigError, match=message):
        build_model(recipe(section))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "gpt_nanoo"}, "model: .*'gpt_nano'"),
        ({"overrides": {"hidden_sise": 3}}, "model: 'hidden_sise' is not a field"),
        ({"context_length": 2048}, "data.context_length=2048 exceeds"),
    ],
)
def test_a_bad_model_names_key_and_rule(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(recipe(**changes))


def test_a_dense_structure_is_a_structure_too():
    model, report = build_model(recipe({"structure": "dense"}))
    assert set(structures(model).values()) == {DenseConfig()}
    assert report.param_ratio == 1

"""The parts that ``anatomy_of`` finds, against what each family's own code names them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from factorlm.anatomy import anatomy_of, decoder_layers
from factorlm.layers import LowRankConfig, LowRankLinear
from factorlm.testing.models import HIDDEN_SIZE, INTERMEDIATE_SIZE, TINY_CONFIGS, tiny_model

SWIGLU = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
MLP_C = {"mlp.c_fc", "mlp.c_proj"}
SHARED_EXPERT = {f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
FFN = {
    "gpt2": MLP_C,
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
    "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "starcoder2": MLP_C,
    "mixtral": set(),
    "qwen2_moe": SHARED_EXPERT,
    "bloom": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "falcon": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gpt_bigcode": MLP_C,
    "gpt_neo": MLP_C,
    "gptj": {"mlp.fc_in", "mlp.fc_out"},
    "mpt": {"ffn.up_proj", "ffn.down_proj"},
    "phi": {"mlp.fc1", "mlp.fc2"},
}
"""What each family calls the linears of its FFN; the others have Llama's three."""


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_ffn_linears_are_those_of_the_family(family: str) -> None:
    model = tiny_model(family, device="meta")
    anatomy = anatomy_of(model)
    layers = anatomy.decoder_layers
    assert len(layers) == model.config.num_hidden_layers
    expected = {f"{layer}.{name}" for layer in layers for name in FFN.get(family, SWIGLU)}
    assert {site.name for site in anatomy.ffn_linears} == expected
    for site in anatomy.ffn_linears:
        assert site.name.startswith(layers[site.layer_index] + ".")


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_parameter_has_a_place(family: str) -> None:
    model = tiny_model(family, device="meta")
    anatomy = anatomy_of(model)
    placed = {site.name for site in (*anatomy.ffn_linears, *anatomy.routers)}
    placed |= {*anatomy.attention, *anatomy.norms, *anatomy.other_embeddings}
    placed |= {anatomy.input_embedding, anatomy.head} | {site.name for site in anatomy.experts}
    left = [
        name
        for name, _ in model.named_parameters()
        if not any(name == part or name.startswith(f"{part}.") for part in placed)
    ]
    # Top-k routers keep their weight as a bare matrix.
    assert all(name.endswith("mlp.gate.weight") and anatomy.experts for name in left)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_sizes_and_counts_are_those_of_the_weights(family: str) -> None:
    model = tiny_model(family, device="meta")
    anatomy = anatomy_of(model)
    assert anatomy.attention_linears
    for site in (*anatomy.ffn_linears, *anatomy.attention_linears, *anatomy.routers):
        module = model.get_submodule(site.name)
        shape = tuple(module.weight.shape)
        assert (site.kind == "conv1d") == (not isinstance(module, nn.Linear))
        assert shape[:: -1 if site.kind == "linear" else 1] == (site.in_features, site.out_features)
        assert site.num_params == module.weight.numel()
        assert site.bias == (module.bias is not None)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_embeddings_and_head(family: str) -> None:
    model = tiny_model(family, device="meta")
    anatomy = anatomy_of(model)
    assert model.get_submodule(str(anatomy.input_embedding)) is model.get_input_embeddings()
    assert anatomy.head is not None
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()
    assert anatomy.tied == model.config.tie_word_embeddings
    learned = {"gpt2", "opt", "gpt_bigcode", "gpt_neo"}
    assert len(anatomy.other_embeddings) == (family in learned)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bloom"])
def test_base_model_has_the_same_parts_without_prefix(family: str) -> None:
    whole = tiny_model(family, device="meta")
    with torch.device("meta"):
        base = AutoModel.from_config(TINY_CONFIGS[family]())
    prefix = f"{whole.base_model_prefix}."
    names = [site.name.removeprefix(prefix) for site in anatomy_of(whole).ffn_linears]
    anatomy = anatomy_of(base)
    assert [site.name for site in anatomy.ffn_linears] == names
    assert anatomy.head is None
    assert not anatomy.tied


def test_structured_layer_counts_as_the_linear_it_replaced() -> None:
    model = tiny_model("llama")
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = LowRankLinear.from_linear(old, LowRankConfig(rank=4))
    sites = {site.name: site for site in anatomy_of(model).ffn_linears}
    site = sites["model.layers.1.mlp.up_proj"]
    assert (site.kind, site.in_features, site.out_features) == (
        "low_rank",
        HIDDEN_SIZE,
        INTERMEDIATE_SIZE,
    )
    assert site.num_params == 4 * (HIDDEN_SIZE + INTERMEDIATE_SIZE)
    assert len(sites) == 9


def test_experts_and_routers_are_reported() -> None:
    anatomy = anatomy_of(tiny_model("qwen2_moe", device="meta"))
    assert {site.name for site in anatomy.routers} == {
        f"model.layers.{index}.mlp.shared_expert_gate" for index in range(3)
    }
    first = anatomy.experts[0]
    assert (first.name, first.shape) == ("model.layers.0.mlp.experts.gate_up_proj", (4, 48, 32))
    assert first.num_params == 4 * 48 * 32
    assert len(anatomy.experts) == 6


@pytest.mark.parametrize(
    ("family", "router"), [("phimoe", "mlp.router"), ("afmoe", "mlp.router.gate")]
)
def test_linear_routers_are_not_ffn(family: str, router: str) -> None:
    config = CONFIG_MAPPING[family](
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=None,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    anatomy = anatomy_of(model)
    assert anatomy.routers
    assert all(site.name.endswith(router) for site in anatomy.routers)
    assert not any("router" in site.name for site in anatomy.ffn_linears)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.expand, self.contract = nn.Linear(8, 16), nn.Linear(16, 8)


def test_a_model_of_ones_own_and_shared_layers() -> None:
    block = _Block()
    model = nn.Module()
    model.blocks = nn.ModuleList([block, block, _Block()])
    anatomy = anatomy_of(model)
    assert anatomy.decoder_layers == ("blocks.0", "blocks.2")
    assert [site.name for site in anatomy.ffn_linears] == [
        "blocks.0.expand",
        "blocks.0.contract",
        "blocks.2.expand",
        "blocks.2.contract",
    ]
    assert [site.layer_index for site in anatomy.ffn_linears] == [0, 0, 2, 2]
    assert decoder_layers(model) == [block, block, model.blocks[2]]
    assert (anatomy.input_embedding, anatomy.head, anatomy.tied) == (None, None, False)


def test_no_decoder_layers_is_an_empty_anatomy() -> None:
    anatomy = anatomy_of(nn.Sequential(nn.Linear(4, 4)))
    assert anatomy.decoder_layers == anatomy.ffn_linears == ()

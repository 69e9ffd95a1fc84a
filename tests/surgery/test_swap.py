"""``factorize_`` and ``densify_`` on every family, in float64 where an identity is claimed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factorlm.anatomy import anatomy_of
from factorlm.errors import ConfigError, NumericError
from factorlm.layers import (
    STRUCTURES,
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    LowRankConfig,
    StructureConfig,
    StructuredLinear,
)
from factorlm.surgery import StructureMap, densify_, factorize_, read_block
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids, tiny_model

SWAPPABLE = [family for family in TINY_CONFIGS if family != "mixtral"]
FULL_RANK = {
    "dense": DenseConfig(),
    "low_rank": LowRankConfig(rank=32),
    "block_dense": BlockDenseConfig(num_blocks=1, rank=32),
    "block_shuffle": BlockShuffleConfig(num_blocks=1),
}
"""For I = 32 or O = 32: products that hold any dense weight exactly."""


def structured(model: nn.Module) -> dict[str, StructuredLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tiny_input_ids()).logits


def double_model(family: str) -> PreTrainedModel:
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")  # the grouped matmul has no float64
    return model


@pytest.mark.parametrize("family", SWAPPABLE)
def test_every_ffn_linear_but_the_first_layers_is_swapped(family: str) -> None:
    model = double_model(family)
    before = logits(model)
    sites = [site for site in anatomy_of(model).ffn_linears if site.layer_index > 0]
    report = factorize_(model, LowRankConfig(rank=32))
    assert list(structured(model)) == [site.name for site in sites]
    assert [row.name for row in report.rows] == [site.name for site in sites]
    assert report.before_params == sum(site.num_params for site in sites)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", SWAPPABLE)
def test_densify_gives_the_familys_own_modules(family: str) -> None:
    model = double_model(family)
    stock = [(name, type(module)) for name, module in model.named_modules()]
    keys = list(model.state_dict())
    factorize_(model, LowRankConfig(), param_ratio=0.3)
    before, dense = logits(model), {n: m.to_dense() for n, m in structured(model).items()}
    report = densify_(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == stock
    assert list(model.state_dict()) == keys
    assert "quantization_config" not in model.config.to_dict()
    assert [row.after_params for row in report.rows] == [w.numel() for w in dense.values()]
    for name, weight in dense.items():
        module = model.get_submodule(name)
        kept = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert torch.equal(kept, weight)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_every_structure_can_be_put_in_and_taken_out(kind: str) -> None:
    model = tiny_model("starcoder2").double()
    before = logits(model)
    factorize_(model, FULL_RANK[kind])
    assert {module.config.kind for module in structured(model).values()} == {kind}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)
    densify_(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)


def test_the_block_is_plain_json_and_names_every_layer() -> None:
    model = tiny_model("gpt2")
    factorize_(model, LowRankConfig(rank=4))
    block = model.config.quantization_config
    assert type(block) is dict
    assert json.loads(json.dumps(block)) == block
    assert (block["quant_method"], block["format_version"]) == ("factorlm", 1)
    assert list(block["targets"]) == list(structured(model))
    assert block["targets"]["transformer.h.1.mlp.c_fc"] == {
        "structure": "low_rank",
        "version": 1,
        "init": "paper",
        "rank": 4,
    }
    assert set(read_block(block).rules.values()) == {LowRankConfig(rank=4)}


def test_project_is_the_best_approximation_and_keeps_the_bias() -> None:
    model = tiny_model("gpt2")
    old = model.transformer.h[1].mlp.c_fc
    with torch.no_grad():
        old.bias.normal_()
    factorize_(model, LowRankConfig(rank=5))
    new = model.transformer.h[1].mlp.c_fc
    values = torch.linalg.svdvals(old.weight.detach().double())
    expected = float(values[5:].norm() / values.norm())
    assert new.relative_error(old.weight.T) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(new.bias, old.bias)


def test_reset_draws_with_the_models_own_deviation() -> None:
    model = tiny_model("llama", hidden_size=256, initializer_range=0.5)
    factorize_(model, LowRankConfig(rank=80), weights="reset")
    for layer in structured(model).values():
        # A spectral draw of full rank keeps the Gaussian; its entries have its deviation.
        assert float(layer.to_dense().std()) == pytest.approx(0.5, rel=0.05)


def test_empty_on_the_meta_device_allocates_nothing() -> None:
    model = tiny_model("llama", device="meta")
    report = factorize_(model, LowRankConfig(rank=4), weights="empty")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(report.rows) == 6


def test_dtype_mode_and_frozenness_are_kept() -> None:
    model = tiny_model("llama").bfloat16().eval().requires_grad_(False)
    factorize_(model, LowRankConfig(rank=4))
    for layer in structured(model).values():
        assert not layer.training
        for parameter in layer.parameters():
            assert (parameter.dtype, parameter.requires_grad) == (torch.bfloat16, False)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_weights_and_biases_are_frozen_apart(frozen: str) -> None:
    model = tiny_model("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    factorize_(model, LowRankConfig(rank=4))
    factorize_(model, LowRankConfig(rank=3))
    layer = model.transformer.h[1].mlp.c_fc
    trainable = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    weights = frozen == "bias"
    assert trainable == {"V": weights, "U": weights, "bias": not weights}
    densify_(model)
    dense = model.transformer.h[1].mlp.c_fc
    assert (dense.weight.requires_grad, dense.bias.requires_grad) == (weights, not weights)


def test_a_structured_model_can_be_structured_again() -> None:
    model = tiny_model("llama").double()
    factorize_(model, LowRankConfig(rank=16))
    before = logits(model)
    report = factorize_(model, LowRankConfig(rank=32))
    assert {(row.before_kind, row.after_kind) for row in report.rows} == {("low_rank", "low_rank")}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    targets = model.config.quantization_config["targets"]
    assert {target["rank"] for target in targets.values()} == {32}


def test_a_shared_module_is_replaced_once_for_all_its_parents() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp = layers[1].mlp
    report = factorize_(model, LowRankConfig(rank=4))
    assert [row.name.split(".")[2] for row in report.rows] == ["1", "1", "1"]
    assert layers[2].mlp.up_proj is layers[1].mlp.up_proj
    assert isinstance(layers[1].mlp.up_proj, StructuredLinear)
    densify_(model)
    assert layers[2].mlp.up_proj is layers[1].mlp.up_proj
    assert isinstance(layers[1].mlp.up_proj, nn.Linear)


def test_a_module_under_two_names_of_one_parent() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(8, 8)
    factorize_(model, LowRankConfig(rank=2), filter_fn=lambda module, name: True)
    assert model.first is model.second
    assert isinstance(model.first, StructuredLinear)


@pytest.mark.parametrize("family", ["starcoder2", "gpt2", "cohere"])
def test_embeddings_and_a_tied_head_are_never_touched(family: str) -> None:
    model = tiny_model(family)
    head = model.get_output_embeddings()
    factorize_(model, LowRankConfig(rank=2), filter_fn=lambda module, name: True)
    assert model.get_output_embeddings() is head
    assert head.weight is model.get_input_embeddings().weight
    attention = anatomy_of(model).attention_linears
    assert {site.kind for site in attention} == {"low_rank"}


def test_an_untied_head_is_the_users_choice() -> None:
    model = tiny_model("llama")
    factorize_(model, LowRankConfig(rank=2), filter_fn=lambda module, name: name == "lm_head")
    assert list(structured(model)) == ["lm_head"]


def test_filter_fn_replaces_the_default_choice_altogether() -> None:
    model = tiny_model("llama")

    def up_projections(module: nn.Module, name: str) -> bool:
        return name.endswith("up_proj")

    factorize_(model, LowRankConfig(rank=2), filter_fn=up_projections, keep_first_dense=True)
    assert list(structured(model)) == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]


def test_the_first_layer_can_be_swapped_too() -> None:
    model = tiny_model("llama")
    report = factorize_(model, LowRankConfig(rank=2), keep_first_dense=False)
    assert len(report.rows) == 9


class TestRefusals:
    @pytest.mark.parametrize(
        ("family", "config", "message"),
        [
            ("llama", LowRankConfig(rank=33), "model.layers.1.mlp.gate_proj: rank=33 exceeds"),
            ("llama", LowRankConfig(), "rank=None"),
            ("mixtral", LowRankConfig(rank=2), "expert tensors.*model.layers.0.mlp.experts"),
            ("llama", StructureMap({"*": None}), "the structure map leaves all of the 22"),
        ],
    )
    def test_nothing_is_changed(
        self, family: str, config: StructureConfig | StructureMap, message: str
    ) -> None:
        model = tiny_model(family)
        with pytest.raises(ConfigError, match=message):
            factorize_(model, config)
        assert not structured(model)
        assert "quantization_config" not in model.config.to_dict()

    def test_a_later_layer_that_does_not_fit_leaves_the_earlier_ones(self) -> None:
        model = tiny_model("llama")
        rules = {"*.up_proj": LowRankConfig(rank=2), "*.down_proj": LowRankConfig(rank=99)}
        with pytest.raises(ConfigError, match="down_proj: rank=99"):
            factorize_(model, StructureMap(rules))
        assert not structured(model)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value: float) -> None:
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 0] = value
        with pytest.raises(NumericError, match=r"layers\.2\.mlp\.up_proj\.weight is not finite"):
            factorize_(model, LowRankConfig(rank=2))
        assert not structured(model)
        factorize_(model, LowRankConfig(rank=2), weights="reset")

    @pytest.mark.parametrize("config", ["low_rank", LowRankConfig, {"*": LowRankConfig(rank=2)}])
    def test_what_is_no_config(self, config: object) -> None:
        with pytest.raises(ConfigError, match=r"config=.* must be a StructureConfig"):
            factorize_(tiny_model("llama"), config)  # type: ignore[arg-type]

    def test_zero_matches_names_what_it_looked_at(self) -> None:
        with pytest.raises(ConfigError, match=r"filter_fn chose none of the 22 .*LlamaForCausalLM"):
            factorize_(
                tiny_model("llama"), LowRankConfig(rank=2), filter_fn=lambda module, name: False
            )
        with pytest.raises(ConfigError, match="0 decoder layers with 0 FFN linears"):
            factorize_(nn.Sequential(nn.Linear(4, 4)), LowRankConfig(rank=2))

    def test_one_layer_alone_stays_dense(self) -> None:
        with pytest.raises(ConfigError, match=r"the first layer stays dense \(keep_first_dense\)"):
            factorize_(tiny_model("llama", num_hidden_layers=1), LowRankConfig(rank=2))

    def test_the_root_itself(self) -> None:
        with pytest.raises(ConfigError, match="the model itself is a Linear: use from_linear"):
            factorize_(nn.Linear(8, 8), LowRankConfig(rank=2), filter_fn=lambda module, name: True)
        with pytest.raises(ConfigError, match="the model itself is a LowRankLinear: use to_linear"):
            densify_(LowRankConfig(rank=2).build(8, 8))

    def test_quantized_weights(self) -> None:
        model = tiny_model("llama")
        model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
        with pytest.raises(ConfigError, match="quant_method='gptq'"):
            factorize_(model, LowRankConfig(rank=2))

    def test_densify_without_a_structured_layer(self) -> None:
        with pytest.raises(ConfigError, match="LlamaForCausalLM has no structured layer"):
            densify_(tiny_model("llama"))

    def test_a_multiple_without_a_share(self) -> None:
        with pytest.raises(ConfigError, match=r"multiple_of=8 .* needs param_ratio"):
            factorize_(tiny_model("llama"), LowRankConfig(rank=2), multiple_of=8)

    def test_an_unknown_way_to_fill(self) -> None:
        with pytest.raises(ConfigError, match="weights='zeros'"):
            factorize_(tiny_model("llama"), LowRankConfig(rank=2), weights="zeros")  # type: ignore[arg-type]


def test_report_says_what_was_swapped_and_what_was_not_touched() -> None:
    model = tiny_model("qwen2_moe", device="meta")
    report = factorize_(model, LowRankConfig(rank=6), weights="empty")
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "before", "after", "share"]
    assert lines[1].split() == [
        "model.layers.1.mlp.shared_expert.gate_proj",
        *("linear", "->", "low_rank", "1,536", "480", "31.2%"),
    ]
    assert lines[7].split() == ["total:", "6", "layers", "9,216", "2,880", "31.2%"]
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert lines[8] == f"not touched: 6 expert tensors, {experts:,} parameters"
    assert "model.layers.2.mlp.experts.down_proj" in lines[-1]
    assert len({line.rindex("%") for line in lines[1:8]}) == 1

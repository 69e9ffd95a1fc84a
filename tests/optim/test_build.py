"""Which parameters go by which rule, at which rate, under which name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from factorlm.errors import ConfigError
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, StructureConfig
from factorlm.optim import FactorOptimizer, adamw, build_optimizer, factor_multipliers, release_
from factorlm.surgery import factorize_
from factorlm.surgery.guides import attach_guides_, detach_guides_
from factorlm.testing.models import HIDDEN_SIZE, TINY_CONFIGS, tiny_input_ids, tiny_model

STRUCTURES: dict[str, StructureConfig] = {
    "low_rank": LowRankConfig(rank=8),
    "block_shuffle": BlockShuffleConfig(num_blocks=4),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=8),
}


def structured(name: str = "low_rank", family: str = "llama", **fields: Any) -> PreTrainedModel:
    model = tiny_model(family, **fields).train()
    factorize_(model, STRUCTURES[name])
    return model


def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, **({"learning_rate": 1e-2} | options))


def by_name(optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    """An option of the group that each parameter is in."""
    return {name: group[key] for group in optimizer.param_groups for name in group["names"]}


def step_once(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    ids = tiny_input_ids()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "muon", "spectron"])
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_parameter_of_every_family_is_there_once(family: str, kind: str) -> None:
    model = tiny_model(family, device="meta")
    found = build(model, kind=kind)
    own = dict(model.named_parameters())
    names = [name for group in found.param_groups for name in group["names"]]
    held = [parameter for group in found.param_groups for parameter in group["params"]]
    assert sorted(names) == sorted(own)
    assert all(own[name] is parameter for name, parameter in zip(names, held, strict=True))
    assert set(by_name(found, "rate_multiplier").values()) == {1.0}
    assert all(group["params"] for group in found.param_groups)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "qwen2_moe", "bloom"])
def test_muon_takes_the_matrices_of_attention_and_ffn(family: str) -> None:
    """Chosen here by the families' own names, which the code does not know."""
    model = tiny_model(family, device="meta")
    layers = re.compile(r"\.(h|layers)\.\d+\..*(attn|attention|mlp)")
    spared = re.compile(r"\.gate\.|\.experts\.|shared_expert_gate")
    for name, rule in by_name(build(model, kind="muon"), "rule").items():
        is_matrix = model.get_parameter(name).ndim == 2
        hidden = is_matrix and bool(layers.search(name)) and not spared.search(name)
        assert rule == ("muon" if hidden else "adamw"), name


@pytest.mark.parametrize("name", STRUCTURES)
def test_spectron_takes_factors_in_pairs_and_muon_the_other_matrices(name: str) -> None:
    model = structured(name)
    optimizer = build(model, kind="spectron", momentum=0.9)
    groups = {group["rule"]: group for group in optimizer.param_groups if group["weight_decay"]}
    first, second = (factor.name for factor in STRUCTURES[name].factors(32, 80))
    pairs = groups["spectron"]["names"]
    assert len(pairs) == 2 * 2 * 3  # the first layer stays dense; gate, up and down
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):
        assert a == b.removesuffix(second) + first
    assert all("self_attn" in n or "layers.0.mlp" in n for n in groups["muon"]["names"])
    assert len(groups["muon"]["names"]) == 3 * 4 + 3
    assert groups["muon"]["momentum"] == groups["spectron"]["momentum"] == 0.9
    step_once(model, optimizer)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_factor_without_a_partner_goes_by_muon() -> None:
    model = structured()
    frozen = "model.layers.1.mlp.up_proj.V"
    model.get_parameter(frozen).requires_grad_(False)
    shared, owner = (model.get_submodule(f"model.layers.{i}.mlp.down_proj") for i in (2, 1))
    shared.U = owner.U
    rules = by_name(build(model, kind="spectron"), "rule")
    assert frozen not in rules
    assert rules["model.layers.1.mlp.up_proj.U"] == "muon"
    assert rules["model.layers.1.mlp.down_proj.U"] == "spectron"
    assert rules["model.layers.2.mlp.down_proj.V"] == "muon"
    assert rules["model.layers.2.mlp.up_proj.U"] == "spectron"


@pytest.mark.parametrize("kind", ["adamw", "muon", "spectron"])
def test_guides_are_matrices_and_names_do_not_change_when_they_go(kind: str) -> None:
    model = structured()
    plain = by_name(build(model, kind=kind), "rule")
    attach_guides_(model)
    optimizer = build(model, kind=kind, weight_decay=0.3)
    guided = by_name(optimizer, "rule")
    guides = guided.keys() - plain.keys()
    assert len(guides) == 6
    assert all(name.endswith(".guide.weight") for name in guides)
    assert {guided[name] for name in guides} == {"adamw" if kind == "adamw" else "muon"}
    assert {by_name(optimizer, "weight_decay")[name] for name in guides} == {0.3}
    assert {name: guided[name] for name in plain} == plain
    step_once(model, optimizer)
    freed = detach_guides_(model)
    assert all(parameter in optimizer.state for parameter in freed)
    release_(optimizer, freed)
    assert not any(parameter in optimizer.state for parameter in freed)
    assert by_name(optimizer, "rule") == plain
    assert len(optimizer.state) == len(list(model.parameters()))
    step_once(model, optimizer)


def test_adamw_is_pytorchs_own_on_the_whole_model() -> None:
    ours, theirs = structured(), structured()
    optimizer = build(ours, weight_decay=0.1, decay="all", eps=1e-6)
    assert type(optimizer) is torch.optim.AdamW
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True
    )
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        step_once(ours, optimizer)
        step_once(theirs, reference)
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(kind: str) -> None:
    model = tiny_model("gpt2", device="meta")
    for name, decay in by_name(build(model, kind=kind, weight_decay=0.1), "weight_decay").items():
        assert decay == (0.1 if model.get_parameter(name).ndim >= 2 else 0.0)
    everything = by_name(build(model, kind=kind, weight_decay=0.1, decay="all"), "weight_decay")
    assert set(everything.values()) == {0.1}


def test_what_is_frozen_is_left_out_and_what_is_tied_is_there_once() -> None:
    model = tiny_model("starcoder2", device="meta")
    model.get_submodule("model.layers.0").requires_grad_(False)
    names = by_name(build(model, kind="muon"), "rule")
    assert "lm_head.weight" not in names
    assert names["model.embed_tokens.weight"] == "adamw"
    assert not any(name.startswith("model.layers.0.") for name in names)


@pytest.mark.parametrize(("in_features", "out_features"), [(32, 80), (80, 32)])
def test_multipliers_are_those_of_the_papers(in_features: int, out_features: int) -> None:
    sizes, m, rank, blocks = (in_features, out_features), 32, 8, 4
    found = factor_multipliers(LowRankConfig(rank=rank), *sizes)
    assert found == (1 / 2, in_features / (2 * rank))  # V, U
    found = factor_multipliers(BlockShuffleConfig(num_blocks=blocks), *sizes)
    assert found == (blocks / 2, in_features * blocks / (2 * m))  # first, second
    found = factor_multipliers(BlockDenseConfig(num_blocks=blocks, rank=rank), *sizes)
    assert found == (blocks / 2, in_features / (2 * rank))  # B, L


@pytest.mark.parametrize(("base_width", "width"), [(None, 1.0), (8, 8 / HIDDEN_SIZE)])
def test_structure_aware_rates(base_width: int | None, width: float) -> None:
    model = structured(tie_word_embeddings=True)
    attach_guides_(model)
    options = {"factor_rates": "structure_aware", "base_width": base_width, "weight_decay": 0.1}
    optimizer = build(model, **options)
    found = by_name(optimizer, "rate_multiplier")
    assert found["model.layers.1.mlp.up_proj.V"] == width / 2
    assert found["model.layers.1.mlp.up_proj.U"] == width * 32 / 16
    assert found["model.layers.1.mlp.down_proj.U"] == width * 80 / 16
    assert found["model.layers.1.mlp.down_proj.guide.weight"] == width
    assert found["model.layers.0.mlp.up_proj.weight"] == width
    assert found["model.layers.1.self_attn.q_proj.weight"] == width
    assert found["model.layers.1.input_layernorm.weight"] == 1
    assert found["model.embed_tokens.weight"] == 1
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-2 * group["rate_multiplier"])
        decayed = group["params"][0].ndim >= 2
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 if decayed else 0.0)


def test_decay_does_not_see_the_multiplier() -> None:
    """Without a gradient's pull, every matrix shrinks by rate x decay."""
    model = structured()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build(model, factor_rates="structure_aware", base_width=8, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 1e-2 * 0.5 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_model_without_decoder_layers_has_its_structured_linears(name: str) -> None:
    layer = STRUCTURES[name].build(16, 32)
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(32, 2)})
    found = by_name(build(model, factor_rates="structure_aware"), "rate_multiplier")
    first, second = (f"layer.{factor.name}" for factor in layer.factors)
    assert (found.pop(first), found.pop(second)) == factor_multipliers(STRUCTURES[name], 16, 32)
    assert set(found.values()) == {1.0}
    rules = by_name(build(model, kind="spectron"), "rule")
    assert {key for key, rule in rules.items() if rule == "spectron"} == {first, second}
    assert rules["head.weight"] == "adamw"


def test_adamw_is_not_fused_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(group["fused"] for group in build(structured()).param_groups)
    monkeypatch.setattr(adamw, "_FUSED_DEVICES", ("cuda",))
    assert not any(group["fused"] for group in build(structured()).param_groups)


class Plain(nn.Module):
    """No decoder layers, no config."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "moun"}, r"optimizer.kind='moun' must be one of .* Did you mean 'muon'\?"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) of a group with rule='adamw'"),
        ({"decay": "none"}, "decay='none' must be one of"),
        ({"factor_rates": "fast"}, "factor_rates='fast' must be one of"),
        ({"base_width": 8}, "base_width=8 needs factor_rates='structure_aware'"),
        (
            {"kind": "muon", "factor_rates": "structure_aware"},
            "factor_rates='structure_aware' is for optimizer.kind='adamw', not 'muon'",
        ),
        (
            {"factor_rates": "structure_aware", "base_width": 8},
            "base_width=8 needs a model whose config states hidden_size, not a Plain",
        ),
        (
            {"factor_rates": "structure_aware", "base_width": 0},
            "base_width=0 must be at least 1",
        ),
        ({"kind": "muon"}, "optimizer.kind='muon': no trainable weight of attention or FFN"),
        (
            {"factor_rates": "structure_aware"},
            "factor_rates='structure_aware': no trainable .* all",
        ),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Plain(), **options)


def test_a_plain_module_trains_by_adamw_and_a_frozen_one_not_at_all() -> None:
    assert by_name(build(Plain()), "rule") == {"linear.weight": "adamw", "linear.bias": "adamw"}
    with pytest.raises(ConfigError, match="Plain has no parameter to train"):
        build(Plain().requires_grad_(False))


def test_releasing_one_of_a_pair_is_refused_and_changes_nothing() -> None:
    pair = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2))]
    optimizer = FactorOptimizer([{"params": pair, "names": ["V", "U"], "rule": "spectron"}])
    with pytest.raises(ConfigError, match=r"len\(params\)=1"):
        release_(optimizer, pair[:1])
    assert optimizer.param_groups[0]["names"] == ["V", "U"]
    release_(optimizer, [*pair, nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["params"] == optimizer.param_groups[0]["names"] == []
    optimizer.step()

"""Guides on a model and off again."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from factorlm.errors import ConfigError
from factorlm.hf import build_causal_lm, load, materialize_
from factorlm.layers import LowRankConfig, SelfGuidedLinear
from factorlm.surgery import attach_guides_, densify_, detach_guides_, guided_layers

IDS = torch.arange(12).view(2, 6)


def structured(device: str = "cpu") -> PreTrainedModel:
    config = LowRankConfig(rank=4)
    return build_causal_lm("gpt_nano", config, vocab_size=32, device=device, seed=3)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_attached_the_model_computes_the_same() -> None:
    model = structured()
    wanted = model(IDS).logits
    names = attach_guides_(model)
    assert len(names) == 10  # both linears of every FFN but the first
    assert names == list(guided_layers(model))
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_detached_nothing_is_left() -> None:
    model = structured()
    before, kinds = state(model), [type(module) for module in model.modules()]
    attach_guides_(model)
    guides = [layer.guide.weight for layer in guided_layers(model).values()]
    assert [id(weight) for weight in detach_guides_(model)] == [id(w) for w in guides]
    assert [type(module) for module in model.modules()] == kinds
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_detached_guide_is_freed() -> None:
    model = structured()
    attach_guides_(model)
    layer = next(iter(guided_layers(model).values()))
    watched = weakref.ref(layer.guide.weight)
    del layer
    detach_guides_(model)
    gc.collect()
    assert watched() is None


def test_initial_weights_are_those_of_the_unguided_model() -> None:
    plain = structured()
    model = structured("meta")
    attach_guides_(model)
    materialize_(model, device="cpu", seed=3)
    for layer in guided_layers(model).values():
        assert torch.equal(layer.guide.weight, layer.structured.to_dense())
        assert layer.alpha == 1
    detach_guides_(model)
    wanted = state(plain)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state(model).items())


def test_a_guided_model_is_not_saved_and_a_detached_one_is(tmp_path: Path) -> None:
    model = structured()
    attach_guides_(model)
    with pytest.raises(ConfigError, match="has guides attached"):
        model.save_pretrained(tmp_path / "guided")
    assert not (tmp_path / "guided").exists()
    detach_guides_(model)
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(load(tmp_path / "plain")(IDS).logits, model.eval()(IDS).logits)


def test_refusals() -> None:
    dense = build_causal_lm("gpt_nano", vocab_size=32)
    with pytest.raises(ConfigError, match="has no structured layer to guide"):
        attach_guides_(dense)
    model = structured()
    attach_guides_(model, form="two_path")
    assert {layer.form for layer in guided_layers(model).values()} == {"two_path"}
    with pytest.raises(ConfigError, match="has guides already"):
        attach_guides_(model)
    with pytest.raises(ConfigError, match="detach_guides_ first"):
        densify_(model)
    assert any(isinstance(module, SelfGuidedLinear) for module in model.modules())

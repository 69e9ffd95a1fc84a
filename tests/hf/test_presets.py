"""Presets: the published parameter counts, and no unknown field."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from factorlm.errors import ConfigError
from factorlm.hf import PRESETS, build_causal_lm, preset_config
from factorlm.layers import LowRankConfig


def num_params(name: str, rank: int | None = None) -> float:
    structure = None if rank is None else LowRankConfig(rank=rank)
    model = build_causal_lm(name, structure, device="meta")
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)


@pytest.mark.parametrize(
    ("name", "rank", "millions"),
    [
        ("gpt_s", None, 109.63),
        ("gpt_m", None, 335.08),
        ("gpt_l", None, 729.11),
        ("gpt_xl", None, 1274.14),
        ("gpt_xl", 1024, 984.73),
        ("gpt_xl", 512, 743.56),
        ("gpt_wide_m", 512, 219.44),
        ("gpt_wide_l", 768, 464.43),
        ("llama_s", None, 137.84),
    ],
)
def test_parameter_counts_of_the_papers(name: str, rank: int | None, millions: float) -> None:
    """arXiv 2407.09835, with biases and norms and the first layer's FFN dense."""
    assert num_params(name, rank) == millions


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_is_tied(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(name))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.rope_parameters["rope_theta"] == 10000.0


def test_the_gpt_of_the_papers() -> None:
    config = preset_config("gpt_wide_m")
    assert (config.hidden_act, config.use_bias, config.norm_epsilon) == ("gelu", True, 1e-5)
    assert (config.initializer_range, config.vocab_size) == (0.02, 32000)
    dropouts = (config.residual_dropout, config.embedding_dropout, config.attention_dropout)
    assert dropouts == (0.0, 0.0, 0.0)
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    assert tuple(attention.q_proj.weight.shape) == (512, 1024)
    assert tuple(attention.k_proj.weight.shape) == (256, 1024)


@pytest.mark.parametrize("name", ["gpt_nano", "llama_nano"])
def test_the_smallest_suits_a_cpu(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(name, vocab_size=257))
    assert 0.25e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.45e6


def test_overrides_reach_derived_fields() -> None:
    config = preset_config("gpt_tiny", num_attention_heads=8, vocab_size=77, hidden_size=64)
    assert (config.num_key_value_heads, config.vocab_size, config.hidden_size) == (8, 77, 64)
    assert preset_config("gpt_wide_m", num_attention_heads=4).head_dim == 128


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gpt_tiney", {}, "unknown preset 'gpt_tiney'.*Did you mean 'gpt_tiny'"),
        ("gpt_tiny", {"hidden_sise": 3}, "'hidden_sise' is not a field.*'hidden_size'"),
        ("llama_tiny", {"use_bias": True}, "'use_bias' is not a field of LlamaConfig"),
        ("gpt_tiny", {"hidden_size": "3"}, "hidden_size"),
        ("llama_tiny", {"num_attention_heads": 5}, "hidden size.*multiple of.*attention heads"),
    ],
)
def test_refusals(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset_config(name, **overrides)

"""``build_causal_lm`` from a preset, a config, a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from factorlm.errors import CheckpointError, ConfigError
from factorlm.hf import build_causal_lm, model_config
from factorlm.layers import LowRankConfig, LowRankLinear
from factorlm.surgery import StructureMap, read_block
from factorlm.testing.models import TINY_CONFIGS, tiny_model

LOW_RANK = LowRankConfig(rank=4)


def test_from_a_preset_with_overrides() -> None:
    model = build_causal_lm("gpt_tiny", LowRankConfig(), param_ratio=0.32, vocab_size=50)
    assert model.config.vocab_size == 50
    mlp = model.model.layers[1].mlp
    assert (mlp.c_fc.config.rank, mlp.c_proj.config.rank) == (32, 32)
    assert isinstance(model.model.layers[0].mlp.c_fc, torch.nn.Linear)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_surgery_options_are_passed_on() -> None:
    def up(module: torch.nn.Module, name: str) -> bool:
        return name.endswith("up_proj")

    model = build_causal_lm(TINY_CONFIGS["llama"](), LOW_RANK, filter_fn=up)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 3
    model = build_causal_lm(TINY_CONFIGS["llama"](), LOW_RANK, keep_first_dense=False)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 9
    model = build_causal_lm(
        TINY_CONFIGS["llama"](), LowRankConfig(), param_ratio=0.5, multiple_of=8, device="meta"
    )
    assert model.model.layers[1].mlp.up_proj.config.rank == 8


def test_the_given_config_is_not_changed() -> None:
    config = TINY_CONFIGS["llama"]()
    before = config.to_dict()
    build_causal_lm(config, LOW_RANK, vocab_size=50, attn_implementation="eager", device="meta")
    assert config.to_dict() == before


def test_from_a_folder_the_architecture_alone(tmp_path: Path) -> None:
    saved = build_causal_lm(TINY_CONFIGS["qwen3"](), seed=1)
    saved.config.save_pretrained(tmp_path)
    built = build_causal_lm(tmp_path, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), built.parameters(), strict=True)
    )


def test_a_structured_config_builds_a_structured_model() -> None:
    """``AutoModelForCausalLM.from_config`` leaves the block aside; here it counts."""
    config = build_causal_lm(TINY_CONFIGS["llama"](), LOW_RANK, device="meta").config
    again = build_causal_lm(config, device="meta")
    assert isinstance(again.model.layers[1].mlp.up_proj, LowRankLinear)
    other = build_causal_lm(config, LowRankConfig(rank=7), device="meta")
    rules = read_block(other.config.quantization_config)
    assert set(rules.rules.values()) == {LowRankConfig(rank=7)}


def test_structure_map() -> None:
    model = build_causal_lm(TINY_CONFIGS["gpt2"](), StructureMap({"*.0.mlp.c_fc": LOW_RANK}))
    assert isinstance(model.transformer.h[0].mlp.c_fc, LowRankLinear)


def test_it_is_in_the_mode_and_dtype_of_from_config() -> None:
    model = build_causal_lm(TINY_CONFIGS["llama"](), LOW_RANK, dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"](), dtype=torch.bfloat16)
    assert model.training == stock.training
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in stock.parameters()}


def test_model_config_of_a_config_checks_and_changes() -> None:
    config = tiny_model("llama", device="meta").config
    assert model_config(config, hidden_size=64).hidden_size == 64
    with pytest.raises(ConfigError, match="'hidden_sise' is not a field of LlamaConfig"):
        model_config(config, hidden_sise=64)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ("gpt_tinny", {}, ConfigError, "'gpt_tinny' is no preset.*Did you mean 'gpt_tiny'"),
        ("gpt_tiny", {"vocab_sise": 1}, ConfigError, "'vocab_sise'.*'vocab_size'"),
        ("gpt_tiny", {"param_ratio": 0.3}, ConfigError, "param_ratio=0.3 needs a structure"),
        ("./nowhere", {}, CheckpointError, "no such folder"),
    ],
)
def test_refusals(
    model: str, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_causal_lm(model, **arguments)  # type: ignore[arg-type]

"""Tiny random Hugging Face configs, one a family: a model of each builds in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 99
"""Odd, so that nothing depends on a friendly vocabulary."""
HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 80

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def _modern(model_type: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    """A family whose config has Llama's field names."""
    return _config(
        model_type,
        **{
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": INTERMEDIATE_SIZE,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        | fields,
    )


def _config(model_type: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    def build() -> PretrainedConfig:
        return CONFIG_MAPPING[model_type](vocab_size=VOCAB_SIZE, **(_SPECIAL | fields))

    return build


def _gpt2(model_type: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    """A family whose config has GPT-2's field names."""
    sizes = {"n_embd": HIDDEN_SIZE, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return _config(model_type, **(sizes | fields))


TINY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": _gpt2("gpt2"),
    "gpt_neox": _modern("gpt_neox"),
    "opt": _config(
        "opt",
        hidden_size=HIDDEN_SIZE,
        ffn_dim=INTERMEDIATE_SIZE,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=HIDDEN_SIZE,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
    "llama": _modern("llama"),
    "mistral": _modern("mistral"),
    "qwen2": _modern("qwen2"),
    "qwen3": _modern("qwen3", head_dim=8),
    "gemma2": _modern("gemma2", head_dim=8),
    "phi3": _modern("phi3"),
    "starcoder2": _modern("starcoder2", tie_word_embeddings=True),
    "olmo2": _modern("olmo2"),
    "cohere": _modern("cohere"),
    "granite": _modern("granite", logits_scaling=4.0),
    "mixtral": _modern("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _modern(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
    ),
    "bloom": _config("bloom", hidden_size=HIDDEN_SIZE, n_layer=3, n_head=4),
    "cohere2": _modern("cohere2", layer_types=["full_attention"] * 3),
    "falcon": _modern("falcon", ffn_hidden_size=INTERMEDIATE_SIZE),
    "gemma3_text": _modern("gemma3_text", head_dim=8),
    "gpt_bigcode": _gpt2("gpt_bigcode"),
    "gpt_neo": _config(
        "gpt_neo",
        hidden_size=HIDDEN_SIZE,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gptj": _gpt2("gptj", rotary_dim=8),
    "mpt": _config("mpt", d_model=HIDDEN_SIZE, n_layers=3, n_heads=4, max_seq_len=64),
    "olmo": _modern("olmo"),
    "phi": _modern("phi"),
    "smollm3": _modern("smollm3"),
    "stablelm": _modern("stablelm"),
}
"""Family -> a function that gives its tiny config."""


def tiny_model(
    family: str, *, device: str = "cpu", seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A random causal LM of ``family`` in eval mode, with some config fields changed."""
    config = TINY_CONFIGS[family]()
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_input_ids(*, batch: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Random token ids, (batch, length), int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)

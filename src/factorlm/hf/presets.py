"""Named models: one table of sizes, two architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PretrainedConfig, Starcoder2Config

from factorlm.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Size:
    """The shape of a Transformer."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_kv_heads: int | None = None
    """None: as many as heads."""
    attention_width: int | None = None
    """Heads x head size; None: the hidden size."""


SIZES: Mapping[str, Size] = {
    "nano": Size(64, 6, 4, 256),
    "tiny": Size(128, 4, 4, 512),
    "mini": Size(192, 6, 6, 768),
    "xs": Size(384, 6, 6, 1536),
    "s": Size(768, 12, 12, 3072),
    "m": Size(1024, 24, 16, 4096),
    "l": Size(1536, 24, 12, 6144),
    "xl": Size(2048, 24, 16, 8192),
    "wide_m": Size(1024, 24, 8, 4864, num_kv_heads=4, attention_width=512),
    "wide_l": Size(1536, 24, 12, 7424, num_kv_heads=4, attention_width=768),
}
"""``s`` to ``xl`` and the wide networks are those of arXiv 2407.09835 and 2406.16450. As
``gpt_*`` and without the embedding, ``nano`` has 0.3M parameters, ``tiny`` 0.8M, ``mini`` 2.7M,
``xs`` 10.6M."""

_COMMON = {
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _gpt(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The papers' GPT: pre-LayerNorm, RoPE, exact GELU, biases, no dropout."""
    own = {"hidden_act": "gelu", "use_bias": True, "norm_epsilon": 1e-5, "sliding_window": None}
    return Starcoder2Config(**{**_COMMON, **own, **fields})


def _llama(fields: Mapping[str, Any]) -> PretrainedConfig:
    """RMSNorm, SwiGLU (three matrices of the same FFN width), no biases."""
    return LlamaConfig(**{**_COMMON, "rms_norm_eps": 1e-5, **fields})


ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any]], PretrainedConfig]] = {
    "gpt": _gpt,
    "llama": _llama,
}

PRESETS: tuple[str, ...] = tuple(f"{kind}_{size}" for kind in ARCHITECTURES for size in SIZES)
"""``gpt_nano`` ... ``gpt_wide_l``, ``llama_nano`` ... ``llama_wide_l``."""


def preset_config(name: str, **overrides: Any) -> PretrainedConfig:
    """The Hugging Face config of a preset, some of its fields changed.

    Raises ``ConfigError`` for an unknown preset or field, with the nearest known name, and for a
    value that the config refuses.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset '{name}'; known: {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    kind, _, size_name = name.partition("_")
    size = SIZES[size_name]
    num_heads = overrides.get("num_attention_heads", size.num_heads)
    fields: dict[str, Any] = {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": size.num_kv_heads or num_heads,
        "intermediate_size": size.intermediate_size,
    }
    if size.attention_width is not None:
        fields["head_dim"] = size.attention_width // num_heads
    build = ARCHITECTURES[kind]
    check_fields(build({}), overrides)
    return strict(lambda: build(fields | overrides))


def check_fields(config: PretrainedConfig, names: Mapping[str, Any]) -> None:
    """Refuse names that are not fields of ``config``: transformers would store them silently."""
    # Starcoder2 reads head_dim without declaring it.
    known = {*config.to_dict(), *config.attribute_map, "head_dim"}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"'{name}' is not a field of {type(config).__name__}.{did_you_mean(name, known)}"
            )


def strict(build: Callable[[], PretrainedConfig]) -> PretrainedConfig:
    """Run ``build``; what transformers' own checks refuse becomes a ``ConfigError``."""
    try:
        return build()
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(" ".join(str(error).split())) from None

"""Build a causal language model, dense or structured, from a preset, a config or a folder."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from factorlm.config import check
from factorlm.errors import ConfigError, did_you_mean
from factorlm.hf.checkpoint import saved_config
from factorlm.hf.initialize import materialize_
from factorlm.hf.presets import PRESETS, check_fields, preset_config, strict
from factorlm.layers import StructureConfig
from factorlm.surgery import StructureMap, factorize_, read_block
from factorlm.surgery.targets import FilterFn


def build_causal_lm(
    model: str | os.PathLike[str] | PretrainedConfig,
    structure: StructureConfig | StructureMap | None = None,
    *,
    param_ratio: float | None = None,
    multiple_of: int | None = None,
    keep_first_dense: bool = True,
    filter_fn: FilterFn | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A causal LM with fresh weights.

    Args:
        model: a preset's name (``PRESETS``), a Hugging Face config, or a folder or Hub id whose
            architecture is taken without its weights.
        structure: what the FFN linears become, as in ``factorize_``; None leaves them dense, or
            as the config's own ``quantization_config`` block says.
        device: ``"meta"`` allocates nothing; ``materialize_`` then does.
        seed: of the initial weights, which depend on it and on the architecture alone.
        overrides: fields of the Hugging Face config to change, such as ``vocab_size=4096``.

    Raises ``ConfigError`` for an unknown preset or field and for sizes that do not fit.
    """
    config = model_config(model, **overrides)
    block = config.to_dict().get("quantization_config")
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    if structure is None and block is not None:
        structure = read_block(block)
    if structure is not None:
        factorize_(
            built,
            structure,
            filter_fn=filter_fn,
            weights="empty",
            param_ratio=param_ratio,
            multiple_of=multiple_of,
            keep_first_dense=keep_first_dense,
        )
    check(
        structure is not None or param_ratio is None,
        f"param_ratio={param_ratio} needs a structure that solves itself for it",
    )
    if torch.device(device).type != "meta":
        materialize_(built, device=device, seed=seed)
    return built


def model_config(
    model: str | os.PathLike[str] | PretrainedConfig, **overrides: Any
) -> PretrainedConfig:
    """The Hugging Face config that ``build_causal_lm`` builds from; a copy, with ``overrides``."""
    if isinstance(model, str) and model in PRESETS:
        return preset_config(model, **overrides)
    if isinstance(model, PretrainedConfig):
        config = copy.deepcopy(model)
    else:
        _check_name(os.fspath(model))
        config = saved_config(model)
    check_fields(config, overrides)
    if not overrides:
        return config
    fields = config.to_dict() | overrides
    return strict(lambda: type(config).from_dict(fields))


def _check_name(name: str) -> None:
    if not Path(name).exists() and "/" not in name:
        raise ConfigError(
            f"model='{name}' is no preset and no folder; presets: {', '.join(PRESETS)}."
            f"{did_you_mean(name, PRESETS)}"
        )

"""The widths of softmax attention, read from a model."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from factorlm.anatomy import Anatomy, LinearSite, anatomy_of


@dataclass(frozen=True)
class AttentionShape:
    """One attention module, summed over its heads."""

    name: str
    query_width: int
    """Elements of a token's queries: heads times the size of a query."""
    value_width: int
    """Elements that the output projection reads: heads times the size of a value."""
    cache_width: int
    """Elements of keys and values that one token leaves in the KV cache."""


def attention_shapes(
    model: PreTrainedModel, anatomy: Anatomy | None = None
) -> tuple[AttentionShape, ...]:
    """Every softmax attention module of ``model``.

    A module that mixes tokens otherwise (state-space models, linear attention: one that takes no
    mask, or holds a convolution) is left out; its linears are still linears.
    """
    anatomy = anatomy or anatomy_of(model)
    shapes = []
    for name in anatomy.attention:
        if not _is_softmax_attention(model.get_submodule(name)):
            continue
        sites = [s for s in anatomy.attention_linears if s.name.startswith(name + ".")]
        output = _output_projection(sites, model.config.get_text_config().hidden_size)
        if output is not None:
            shapes.append(_shape(name, output, sites, model))
    return tuple(shapes)


def _is_softmax_attention(module: nn.Module) -> bool:
    arguments = inspect.signature(module.forward).parameters
    takes_mask = any("mask" in name for name in arguments)
    return takes_mask and not any(isinstance(child, _ConvNd) for child in module.modules())


def _output_projection(sites: list[LinearSite], hidden_size: int) -> LinearSite | None:
    """The linear that writes the hidden width. Where several do, one that reads another width
    can only be the output; if all read it too, they are equal for our purpose."""
    writes = [site for site in sites if site.out_features == hidden_size]
    narrow = [site for site in writes if site.in_features != hidden_size]
    return next(reversed(narrow or writes), None)


def _shape(
    name: str, output: LinearSite, sites: list[LinearSite], model: PreTrainedModel
) -> AttentionShape:
    config = model.config.get_text_config()
    # Only fields that the family declares: configs also keep unknown ones that they were given.
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    value_width = query_width = output.in_features
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if fields.get("kv_lora_rank") and fields.get("v_head_dim"):  # latent attention
        size = fields["qk_rope_head_dim"] + fields["qk_nope_head_dim"]
        query_width = value_width // fields["v_head_dim"] * size
        cache_width = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
    elif heads and kv_heads:
        cache_width = 2 * value_width * kv_heads // heads
    else:
        cache_width = sum(s.out_features for s in sites if s is not output) - query_width
    return AttentionShape(name, query_width, value_width, cache_width)

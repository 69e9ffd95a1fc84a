"""Memory of a training step and of generation, as formulas."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from factorlm.accounting.attention import AttentionShape, attention_shapes
from factorlm.accounting.recompute import Recompute, ffn_kept_elements
from factorlm.anatomy import Anatomy, LinearSite, anatomy_of, linear_num_params
from factorlm.config import check
from factorlm.layers import StructuredLinear
from factorlm.layers.self_guided import Guide
from factorlm.ops.cross_entropy import CHUNK_ELEMENTS
from factorlm.optim import optimizer_state_bytes

_FP32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one process without sharding. See ``estimate_memory`` for what is counted."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Moments: two for each parameter with AdamW, one for each hidden matrix with Muon and its
    kin."""
    autocast_bytes: int
    """Half-precision copies of the linears' weights and of the guides (merged with their layers or
    not), kept from forward to backward."""
    activations_bytes: int
    """What the decoder layers save for the backward pass of one micro-batch."""
    loss_bytes: int
    """One chunk of logits and its softmax, and the gradients that the loss computes at once."""
    kv_cache_bytes_per_token: int
    """Keys and values of one token in generation; no part of the step."""

    @property
    def step_bytes(self) -> int:
        """A training step: everything but the KV cache."""
        return sum(dataclasses.astuple(self)) - self.kv_cache_bytes_per_token


def estimate_memory(
    model: PreTrainedModel,
    *,
    micro_batch: int,
    seq_len: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    activation_checkpointing: Recompute = False,
    optimizer: str = "adamw",
) -> MemoryEstimate:
    """Estimate the memory of training ``model`` on ``micro_batch`` sequences of ``seq_len`` tokens.

    ``bf16`` means autocast over weights as they are. Exact: weights, gradients, moments, those of
    guides included, and the KV cache (in 2 bytes an element with ``bf16``, else in 4). Activations
    of a decoder layer, per token, with c bytes an element in the matmuls:

    * c for the input of every linear (under autocast each linear has its own copy; else linears
      that read one tensor share it) and for every intermediate of a structured one;
    * c for queries, keys and values;
    * c for what the FFN's first linears write, and again for a gate's activation;
    * 4 for the input of each norm, twice where it has no bias (RMSNorm keeps both sides).

    With activation checkpointing: the 4-byte input of every layer, and one layer's activations.
    With ``"ffn"``: of an FFN its 4-byte input and the narrow products inside, and all of one FFN.
    Left out: attention matrices (a fused kernel keeps none), dropout masks, experts, the
    embedding's output and the last norm, guides merged in float32, temporary buffers, and the
    allocator's fragments.
    """
    check(micro_batch >= 1, f"micro_batch={micro_batch} must be at least 1")
    check(seq_len >= 1, f"seq_len={seq_len} must be at least 1")
    anatomy = anatomy_of(model)
    shapes = attention_shapes(model, anatomy)
    half = precision == "bf16"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    linears = sum(s.num_params for s in (*anatomy.attention_linears, *anatomy.ffn_linears))
    guides = sum(m.weight.numel() for m in model.modules() if isinstance(m, Guide))
    tokens = micro_batch * seq_len
    cached = sum(shape.cache_width for shape in shapes)
    return MemoryEstimate(
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_bytes=optimizer_state_bytes(model, optimizer),
        autocast_bytes=2 * (linears + guides) if half else 0,
        activations_bytes=tokens * _saved(model, anatomy, shapes, half, activation_checkpointing),
        loss_bytes=_loss_bytes(model, tokens),
        kv_cache_bytes_per_token=(2 if half else _FP32_BYTES) * cached,
    )


def _saved(
    model: PreTrainedModel,
    anatomy: Anatomy,
    shapes: tuple[AttentionShape, ...],
    half: bool,
    activation_checkpointing: Recompute,
) -> int:
    """Bytes that all decoder layers save, per token."""
    hidden = model.config.get_text_config().hidden_size
    width = 2 if half else _FP32_BYTES
    layers, widest = [], 0
    for index, name in enumerate(anatomy.decoder_layers):
        attention = [s for s in anatomy.attention_linears if s.layer_index == index]
        ffn = [s for s in anatomy.ffn_linears if s.layer_index == index]
        inside = [s for s in shapes if s.name.startswith(name + ".")]
        elements = _attention_elements(attention, inside, hidden, half)
        elements += sum(_intermediate_elements(model, site) for site in attention)
        in_ffn = _ffn_elements(ffn, hidden, half)
        in_ffn = width * (in_ffn + sum(_intermediate_elements(model, site) for site in ffn))
        if activation_checkpointing == "ffn":
            widest = max(widest, in_ffn)
            in_ffn = _FP32_BYTES * hidden + width * ffn_kept_elements(model, ffn)
        norms = [n for n in anatomy.norms if n.startswith(name + ".")]
        kept = sum(_norm_elements(model.get_submodule(n)) for n in norms)
        layers.append(width * elements + in_ffn + _FP32_BYTES * kept)
    if activation_checkpointing is True:
        return _FP32_BYTES * hidden * len(layers) + max(layers, default=0)
    return sum(layers) + widest


def _attention_elements(
    sites: list[LinearSite], shapes: list[AttentionShape], hidden: int, half: bool
) -> int:
    copies = max(len(sites) - 1, 0) if half else 1
    return copies * hidden + sum(s.query_width + s.value_width + s.cache_width for s in shapes)


def _ffn_elements(sites: list[LinearSite], hidden: int, half: bool) -> int:
    """Inputs of all linears; outputs of the first ones and, where they gate, of the activation."""
    first = [site for site in sites if site.in_features == hidden]
    rest = sum(site.in_features for site in sites if site.in_features != hidden)
    written = sum(site.out_features for site in first)
    copies = len(first) if half else min(len(first), 1)
    return copies * hidden + rest + written + max(written - rest, 0)


def _intermediate_elements(model: nn.Module, site: LinearSite) -> int:
    """What passes between the factors of a structured linear."""
    module = model.get_submodule(site.name)
    if not isinstance(module, StructuredLinear):
        return 0
    return sum(factor.num_blocks * factor.fan_in for factor in module.factors[1:])


def _norm_elements(norm: nn.Module) -> int:
    parameters = list(norm.parameters())
    return parameters[0].numel() * (2 if len(parameters) == 1 else 1)


def _loss_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Two float32 chunks of logits; float32 gradients of the head's weight and of its input."""
    head = model.get_output_embeddings()
    vocab_size, hidden = head.weight.shape
    chunk = min(max(CHUNK_ELEMENTS, vocab_size), tokens * vocab_size)
    return _FP32_BYTES * (2 * chunk + linear_num_params(head) + tokens * hidden)

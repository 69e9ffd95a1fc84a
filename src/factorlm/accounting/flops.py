"""FLOPs by part, in the papers' convention (arXiv 2407.09835; formula in ``flops_per_token``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from factorlm.accounting.attention import attention_shapes
from factorlm.anatomy import (
    Anatomy,
    LinearSite,
    TensorSite,
    anatomy_of,
    is_linear,
    linear_num_params,
)
from factorlm.config import check
from factorlm.errors import ConfigError


@dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs of one token, by part."""

    attention_projections: int
    attention_scores: int
    """Queries times keys, and weights times values."""
    ffn: int
    """FFN linears, routers, and the experts that a token is sent to."""
    head: int
    other: int
    """Linears outside the decoder layers but the head."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(dataclasses.astuple(self))

    @property
    def decoder_layers(self) -> int:
        """What the decoder layers do."""
        return self.attention_projections + self.attention_scores + self.ffn

    def __str__(self) -> str:
        rows = dataclasses.asdict(self) | {"total": self.total}
        return "\n".join(f"{name:<22}{value:>16,}" for name, value in rows.items())


def flops_per_token(model: PreTrainedModel, seq_len: int) -> FlopCount:
    """Forward matmul FLOPs of one token in a sequence of ``seq_len`` tokens.

    Two for each weight of a linear (for each factor's, in a structured one), and
    2 seq_len (query_width + value_width) a layer for attention scores: the full square, not halved
    for causality nor cut to a sliding window. Norms, activations, rotary embeddings, biases and
    the embedding's look-up are free; convolutions and recurrent scans are not counted, and a module
    that the model runs more than once counts once. For the
    papers' GPT, per sequence of S tokens, this is
    2L(2·S·a·H + 2·S·(a/n_q)·n_kv·H + 2·S²·a) + 2·P_ffn·S + 2·S·V·H, a the attention width.

    Raises ``ConfigError`` for a mixture of experts whose config does not say how many experts a
    token is sent to.
    """
    check(seq_len >= 1, f"seq_len={seq_len} must be at least 1")
    anatomy = anatomy_of(model)
    shapes = attention_shapes(model, anatomy)
    sites = (*anatomy.attention_linears, *anatomy.ffn_linears, *anatomy.routers)
    routed = sum(_expert_flops(site, model) for site in anatomy.experts)
    routing = _linear_flops(anatomy.routers) + _bare_router_flops(model, anatomy)
    return FlopCount(
        attention_projections=_linear_flops(anatomy.attention_linears),
        attention_scores=sum(2 * seq_len * (s.query_width + s.value_width) for s in shapes),
        ffn=_linear_flops(anatomy.ffn_linears) + routing + routed,
        head=_head_flops(model, anatomy),
        other=_other_flops(model, anatomy, {site.name for site in sites}),
    )


def _linear_flops(sites: Iterable[LinearSite]) -> int:
    return sum(2 * site.num_params for site in sites)


def _expert_flops(site: TensorSite, model: PreTrainedModel) -> int:
    """Of a tensor (experts, ...) in which a token uses ``num_experts_per_tok`` slices."""
    routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if not isinstance(routed, int):
        raise ConfigError(
            f"num_experts_per_tok={routed}: it is not known how many experts of {site.name} "
            "a token uses"
        )
    return 2 * site.num_params // site.shape[0] * routed


def _bare_router_flops(model: nn.Module, anatomy: Anatomy) -> int:
    """Of routers that hold a matrix of their own in place of a linear."""
    if not anatomy.experts:
        return 0
    inside = tuple(f"{name}." for name in anatomy.decoder_layers)
    mixers = tuple(f"{name}." for name in anatomy.attention)
    return sum(
        2 * parameter.numel()
        for module_name, module in model.named_modules()
        if f"{module_name}.".startswith(inside) and not f"{module_name}.".startswith(mixers)
        if not is_linear(module)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight" and parameter.dim() == 2
    )


def _head_flops(model: nn.Module, anatomy: Anatomy) -> int:
    head = None if anatomy.head is None else model.get_submodule(anatomy.head)
    return 2 * linear_num_params(head) if head is not None and is_linear(head) else 0


def _other_flops(model: nn.Module, anatomy: Anatomy, counted: set[str]) -> int:
    return sum(
        2 * linear_num_params(module)
        for name, module in model.named_modules()
        if is_linear(module) and name not in counted and name != anatomy.head
    )

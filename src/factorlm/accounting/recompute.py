"""What a backward pass computes again, and what it therefore need not keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from factorlm.accounting.flops import FlopCount
from factorlm.anatomy import LinearSite, anatomy_of
from factorlm.layers import Factor, StructuredLinear

Recompute = bool | Literal["ffn"]
"""``True``: every decoder layer; ``"ffn"``: what is wide in the FFNs (``train/recompute.py``)."""


def recomputed_flops_per_token(
    model: PreTrainedModel, forward: FlopCount, recompute: Recompute
) -> int:
    """Matmul FLOPs that the backward pass repeats, of one token."""
    if recompute == "ffn":
        return sum(ffn_recomputed(layer, is_last) for layer, is_last in ffn_layers(model))
    return forward.decoder_layers if recompute else 0


def ffn_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """The linears of all FFNs, and whether each is one that the FFN ends with."""
    hidden = model.config.get_text_config().hidden_size
    for site in anatomy_of(model).ffn_linears:
        yield model.get_submodule(site.name), site.in_features != hidden


def ffn_recomputed(layer: nn.Module, is_last: bool) -> int:
    """FLOPs of a token that ``"ffn"`` repeats in ``layer``.

    Kept are results that are narrower than what they are made of, blocks' aside. Nothing needs
    the result of the FFN's last matmul (unless dropout follows), but blocks notice that late.
    """
    factors = _factors(layer)
    needed = factors[:-1] if is_last and len(factors[-1].shape) == 2 else factors
    return sum(2 * factor.num_params for factor in needed if not _is_kept(factor))


@dataclass(frozen=True)
class Repeats:
    """What the backward pass repeats of a guided structured layer."""

    dense: int
    """How often the dense matmul, that of the guide or the merged one."""
    merging: int
    """How often the dense weight is put together."""
    structured_flops: int
    """FLOPs of a token in the layer without its guide."""
    two_path_flops: int = 0
    """More of those where its guide stands beside it."""


def repeats_of(layer: StructuredLinear, is_last: bool | None, recompute: Recompute) -> Repeats:
    """``is_last`` is that of ``ffn_layers``; None for a layer outside the FFNs."""
    if recompute is True:
        flops = layer.config.flops_per_token(layer.in_features, layer.out_features)
        return Repeats(1, 1, flops)
    if not recompute or is_last is None:
        return Repeats(0, 0, 0)
    alone, beside = (ffn_recomputed(layer, last) for last in (is_last, False))
    return Repeats(0 if is_last else 1, 1, alone, beside - alone)


def ffn_kept_elements(model: nn.Module, sites: list[LinearSite]) -> int:
    """Elements that ``"ffn"`` keeps of the matmuls of an FFN, per token."""
    factors = [f for site in sites for f in _factors(model.get_submodule(site.name))]
    return sum(factor.fan_out for factor in factors if _is_kept(factor))


def _factors(layer: nn.Module) -> tuple[Factor, ...]:
    if isinstance(layer, StructuredLinear):
        return layer.factors
    weight = layer.get_parameter("weight")
    shape = tuple(weight.shape) if isinstance(layer, nn.Linear) else tuple(weight.t().shape)
    return (Factor("weight", shape),)


def _is_kept(factor: Factor) -> bool:
    return len(factor.shape) == 2 and factor.fan_out < factor.fan_in

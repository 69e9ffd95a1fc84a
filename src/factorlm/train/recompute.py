"""Keep only the narrow activations of an FFN; the backward pass computes the wide ones again.

An FFN's memory is its wide activations: what the up projection writes, and what the activation
function makes of it. With low_rank both follow from the rank-R products before them, so only those
are kept (R in place of 8 H values a token). Products of blocks write into memory that is given, not
into a result that could be kept: block_dense and block_shuffle keep nothing inside the FFN and
compute their block products again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from factorlm.anatomy import anatomy_of, decoder_layers
from factorlm.config import check

_OPS = torch.ops.aten
_FACTORS: dict[object, int] = {
    _OPS.mm.default: 0,
    _OPS.bmm.default: 0,
    _OPS.addmm.default: 1,
    _OPS.baddbmm.default: 1,
}
"""Matmuls that return their result, and where their two factors begin among the arguments."""


def keeps_result(context: object, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep the result of a matmul (N, K) x (K, M) with M < K; compute all else again."""
    first = _FACTORS.get(op)
    if first is None or args[first + 1].shape[-1] >= args[first].shape[-1]:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def recompute_ffns_(model: nn.Module) -> list[str]:
    """Wrap the FFN of every decoder layer, in place; the names of those modules.

    Parameters keep their names in state dicts. Raises ``ConfigError`` where a decoder layer holds
    its FFN's linears itself, in no module of their own.
    """
    anatomy = anatomy_of(model)
    layers = zip(anatomy.decoder_layers, decoder_layers(model), strict=True)
    found = []
    for index, (prefix, _) in enumerate(layers):
        names = [site.name for site in anatomy.ffn_linears if site.layer_index == index]
        name = _common_parent(names)
        check(
            name.startswith(prefix + "."),
            f"parallel.activation_checkpointing='ffn': {type(model).__name__} has no module for "
            f"the FFN of {prefix}",
        )
        parent, _, child = name.rpartition(".")
        wrapped = checkpoint_wrapper(
            model.get_submodule(name),
            CheckpointImpl.NO_REENTRANT,
            context_fn=partial(create_selective_checkpoint_contexts, keeps_result),
        )
        setattr(model.get_submodule(parent), child, wrapped)
        found.append(name)
    return found


def _common_parent(names: list[str]) -> str:
    """The innermost module that holds all ``names``; empty for none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)

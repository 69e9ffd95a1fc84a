"""``pack_`` and its inverse ``unpack_``: packed weights for a model on a CPU."""

from __future__ import annotations

import torch
from torch import nn

from factorlm.config import check
from factorlm.layers import (
    MergePolicy,
    PackedLinear,
    PreMergedLinear,
    SelfGuidedLinear,
    StructuredLinear,
)
from factorlm.ops.packed import can_pack
from factorlm.surgery import replace_everywhere

MIN_BYTES = {torch.float32: 2**20, torch.bfloat16: 2**16}
"""Of a layer's matrices. With fewer the processor's caches hold them, and oneDNN's operator takes
longer to start than it saves."""


def pack_(model: nn.Module, *, memory_budget_bytes: int | None = None) -> int:
    """Let the linear layers of ``model`` keep their weights packed too, in place.

    On a CPU a matmul with few tokens, as in decoding, waits for its weights, and oneDNN reads them
    best in an order of its own. The layers compute what they computed, up to rounding, and are
    saved as before. The copies are made by the first calls in eval mode without gradients
    (``PackedLinear``, ``PreMergedLinear``). Where nothing can be packed (an accelerator, float64,
    bf16 on a CPU without it, torch without oneDNN) the model is left as it is, and so are small
    layers (``MIN_BYTES``).

    Args:
        memory_budget_bytes: what the copies may take together; None is no limit. Layers come in
            the model's order; one that does not fit is passed over.

    Returns:
        The bytes that the copies take once all are there, but for what oneDNN adds to fill its
        blocks of rows and columns. Layers that ``premerge_`` gave a merged copy pack by themselves
        and count in its report: call it first.

    Raises ``ConfigError`` for a model that has guides, or is itself a structured layer.
    """
    budget = memory_budget_bytes
    own = isinstance(model, StructuredLinear)
    check(not own, "the model itself is the layer: use PreMergedLinear")
    check(budget is None or budget >= 0, f"memory_budget_bytes={budget} must be at least 0")
    guided = any(isinstance(module, SelfGuidedLinear) for module in model.modules())
    check(not guided, f"{type(model).__name__} has guides attached: detach_guides_ first")
    used = 0
    for module in _plain_layers(model):
        need = _worthwhile_bytes(module)
        if need == 0 or (budget is not None and used + need > budget):
            continue
        used += need
        if isinstance(module, StructuredLinear):
            replace_everywhere(model, module, PreMergedLinear(module, MergePolicy.never()))
        else:
            PackedLinear.pack_(module)
    return used


def unpack_(model: nn.Module) -> None:
    """Take the packed copies off, in place; merged ones stay (``unpremerge_`` takes all off)."""
    for module in list(model.modules()):
        if type(module) is PackedLinear:  # a parametrised one has a class of its own to go first
            module.unpack_()
        elif isinstance(module, PreMergedLinear) and not module.policy.ever_merges:
            replace_everywhere(model, module, module.structured)


def _plain_layers(model: nn.Module) -> list[nn.Linear | StructuredLinear]:
    """The linear layers of ``model`` that keep no copy yet."""
    held = {id(m.structured) for m in model.modules() if isinstance(m, PreMergedLinear)}
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        or (isinstance(module, StructuredLinear) and id(module) not in held)
    ]


def packed_bytes(layer: nn.Linear | StructuredLinear) -> int:
    """What packed copies of the matrices of ``layer`` take; 0: it can have none."""
    matrices = layer.matrices() if isinstance(layer, StructuredLinear) else (layer.weight,)
    return sum(matrix.nbytes for matrix in matrices) if all(map(can_pack, matrices)) else 0


def _worthwhile_bytes(layer: nn.Linear | StructuredLinear) -> int:
    """``packed_bytes``; 0 for a layer that is too small to gain."""
    num_bytes = packed_bytes(layer)
    return num_bytes if num_bytes >= MIN_BYTES.get(next(layer.parameters()).dtype, 0) else 0

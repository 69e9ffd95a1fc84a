"""FLOPs of optimizer steps, in the papers' convention and as they are run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from factorlm.accounting.flops import flops_per_token
from factorlm.accounting.recompute import (
    Recompute,
    ffn_layers,
    recomputed_flops_per_token,
    repeats_of,
)
from factorlm.config import check
from factorlm.layers import StructuredLinear
from factorlm.layers.self_guided import GuideForm, merging_pays
from factorlm.optim import guide_optimizer_flops, optimizer_flops


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a step, or of many."""

    model_flops: int
    """The papers' convention: 3 x forward x tokens, and for a guide, 3 x its dense matmul x
    tokens, however it is computed and whatever the optimizer does."""
    executed_flops: int
    """What is run: recomputed activations, merged guides and the optimizer's matmuls included."""

    def __add__(self, other: TrainingFlops) -> TrainingFlops:
        return TrainingFlops(
            self.model_flops + other.model_flops, self.executed_flops + other.executed_flops
        )

    def times(self, number: float) -> TrainingFlops:
        """Of ``number`` such steps, which may be an expectation."""
        return TrainingFlops(round(self.model_flops * number), round(self.executed_flops * number))


def training_flops(
    model: PreTrainedModel,
    *,
    seq_len: int,
    num_tokens: int,
    num_steps: int = 0,
    optimizer: str = "adamw",
    activation_checkpointing: Recompute = False,
) -> TrainingFlops:
    """FLOPs of training on ``num_tokens`` tokens, in sequences of ``seq_len``, in ``num_steps``
    optimizer steps (which matter only where the ``optimizer`` computes matmuls).

    The backward pass costs twice the forward pass. Activation checkpointing runs every decoder
    layer's forward pass once more (PyTorch may stop it early, short of the layer's last matmul,
    where nothing needs its result), or with ``"ffn"`` the wide matmuls inside the FFNs. AdamW is
    elementwise and counts 0, as do norms, activations and the loss; Newton-Schulz iterations
    count, once, also where replicas repeat them. A fused attention kernel that recomputes its
    scores in the backward pass is not counted as doing so.
    """
    forward = flops_per_token(model, seq_len)
    recomputed = recomputed_flops_per_token(model, forward, activation_checkpointing)
    model_flops = 3 * forward.total * num_tokens
    executed = model_flops + recomputed * num_tokens
    return TrainingFlops(model_flops, executed + num_steps * optimizer_flops(model, optimizer))


def guide_flops(
    model: PreTrainedModel,
    *,
    tokens_per_step: int,
    tokens_per_forward: int,
    optimizer: str = "adamw",
    form: GuideForm = "auto",
    activation_checkpointing: Recompute = False,
    num_processes: int = 1,
) -> TrainingFlops:
    """What one guided step adds to a step of ``model``, whose structured layers are not guided.

    ``form`` is that of ``SelfGuidedLinear``: the two-path form adds the dense matmul, forward and
    backward; the merged form puts it in the place of the structured one, and computes the dense
    weight once in every pass of ``tokens_per_forward`` tokens. ``tokens_per_step`` counts over
    ``num_processes``, each of which makes passes of its own.
    """
    passes = num_processes * math.ceil(tokens_per_step / num_processes / tokens_per_forward)
    lasts = {id(layer): is_last for layer, is_last in ffn_layers(model)}
    papers = executed = 0
    for layer in model.modules():
        if not isinstance(layer, StructuredLinear):
            continue
        again = repeats_of(layer, lasts.get(id(layer)), activation_checkpointing)
        sizes = (layer.in_features, layer.out_features)
        dense = 2 * layer.in_features * layer.out_features * tokens_per_step
        papers += 3 * dense
        executed += (3 + again.dense) * dense + guide_optimizer_flops(*sizes, optimizer)
        if form == "merged" or (
            form == "auto" and merging_pays(layer.config, *sizes, tokens_per_forward)
        ):
            executed += (3 + again.merging) * passes * layer.config.to_dense_flops(*sizes)
            structured = 3 * layer.config.flops_per_token(*sizes) + again.structured_flops
            executed -= structured * tokens_per_step
        else:
            executed += again.two_path_flops * tokens_per_step
    check(papers > 0, f"{type(model).__name__} has no structured layer to guide")
    return TrainingFlops(papers, executed)

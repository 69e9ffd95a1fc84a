"""AdamW, fused where PyTorch has it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from factorlm.optim.groups import decay_groups


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Literal["matrices", "all"] = "matrices",
) -> torch.optim.AdamW:
    """``torch.optim.AdamW`` over the parameters of ``model``; see ``decay_groups``.

    Decoupled weight decay: each step subtracts learning_rate x weight_decay x parameter.
    """
    groups = decay_groups(model, weight_decay, decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)

"""Which parameters decay."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn


def decay_groups(
    model: nn.Module, weight_decay: float, decay: Literal["matrices", "all"] = "matrices"
) -> list[dict[str, Any]]:
    """Parameter groups of ``model``: those with weight decay first, then those without.

    ``matrices`` decays parameters of two or more dimensions and spares biases and norms; ``all``
    decays everything (the rule of arXiv 2407.09835). Groups carry ``names``, the parameters' names
    in order. A tied parameter appears once; empty groups are left out.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0 if decay == "all" or parameter.ndim >= 2 else 1]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]

"""AdamW as an update rule, fused where PyTorch has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from factorlm.optim.rule import RULES, Group, Rule, State

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
"""Where PyTorch has one kernel for all of AdamW. Parameters on meta are not stepped there."""


@final
class AdamWRule(Rule):
    """``torch.optim.AdamW``, for any parameter; decay is decoupled: p ← (1 - lr x decay) p first.

    ``fused`` None means: on the devices that PyTorch has the fused kernel for.
    """

    name = "adamw"
    num_moments = 2
    options: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "fused": None,
    }

    def check_group(self, group: Group) -> None:
        """Betas in [0, 1), eps not negative."""
        betas, eps = group["betas"], group["eps"]
        valid = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        self.check(valid, "betas", betas, "must be two numbers in [0, 1)")
        self.check(eps >= 0, "eps", eps, "must be at least 0")
        if group["fused"] is None:
            group["fused"] = has_fused_kernel(group["params"])

    def update(self, group: Group, state: State) -> None:
        """One step of every parameter that has a gradient."""
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [_ready(state[p], p, group["fused"]) for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [own["exp_avg"] for own in states],
            [own["exp_avg_sq"] for own in states],
            [],
            [own["step"] for own in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def flops(self, shapes: Sequence[Sequence[int]]) -> int:
        """It is elementwise."""
        return 0


def has_fused_kernel(parameters: Iterable[Tensor]) -> bool:
    """Whether PyTorch's fused AdamW runs on the devices of all ``parameters``."""
    return {parameter.device.type for parameter in parameters} <= set(_FUSED_DEVICES)


def _ready(state: dict[str, Tensor], parameter: Tensor, fused: bool) -> dict[str, Tensor]:
    """``state``, filled with zeros where it is empty; the keys are those of torch.optim.AdamW."""
    if not state:
        # Only the fused kernel counts on the device.
        device = parameter.device if fused else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


RULES.register(AdamWRule.name)(AdamWRule())

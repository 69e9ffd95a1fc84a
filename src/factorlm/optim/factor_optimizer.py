"""``FactorOptimizer``: one PyTorch optimizer whose parameter groups each follow a rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT

from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.optim.rule import RULES


@final
class FactorOptimizer(torch.optim.Optimizer):
    """``torch.optim.Optimizer`` over groups that name their update rule.

    A group is a dict with ``params``, ``rule`` (a name in ``RULES``, such as "spectron"), ``lr``
    and that rule's options, for which the rule has values of its own; ``lr`` and ``rule`` default
    to the arguments. Other keys of a group are kept and not read. It asks nothing of a model, and
    works with learning-rate schedulers, with state dicts and with FSDP2.

    Where a pair of factors trains by Spectron, and the rest by Muon and AdamW::

        FactorOptimizer(
            [
                {"params": [V, U], "rule": "spectron"},
                {"params": matrices, "rule": "muon"},
                {"params": others, "rule": "adamw", "weight_decay": 0.0},
            ],
            lr=1e-3,
        )

    Raises ``ConfigError`` for an unknown rule and for values that a rule does not allow.
    """

    def __init__(self, params: ParamsT, *, lr: float = 1e-3, rule: str = "adamw") -> None:
        super().__init__(params, {"lr": lr, "rule": rule})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not set get its rule's values."""
        rule = RULES[param_group.get("rule", self.defaults["rule"])]
        for key, value in rule.options.items():
            param_group.setdefault(key, copy.copy(value))
        super().add_param_group(param_group)  # makes a list of the parameters, which is checked
        try:
            rule.admit(param_group)
        except ConfigError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's. Raises ``ConfigError`` for the state of an optimizer with other rules."""
        for index, (own, saved) in enumerate(
            zip(self.param_groups, state_dict["param_groups"], strict=False)
        ):
            old, new = saved.get("rule"), own["rule"]
            check(
                old == new, f"rule={new!r} of group {index} differs from the state's rule={old!r}"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; the loss of ``closure`` if there is one.

        Raises ``ConfigError`` for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            sparse = any(p.grad is not None and p.grad.is_sparse for p in group["params"])
            check(not sparse, f"rule={group['rule']!r} takes no sparse gradients")
            RULES[group["rule"]].update(group, self.state)
        return loss

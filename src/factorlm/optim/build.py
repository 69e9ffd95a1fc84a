"""``build_optimizer``: from a model and a few numbers to an optimizer over all its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from factorlm.config import check
from factorlm.optim.adamw import has_fused_kernel
from factorlm.optim.factor_optimizer import FactorOptimizer
from factorlm.optim.kinds import Kind, kind_named
from factorlm.optim.members import Member, members
from factorlm.optim.multipliers import width_multiplier
from factorlm.optim.rule import RULES, Group

Decay = Literal["matrices", "all"]
FactorRates = Literal["equal", "structure_aware"]


def build_optimizer(
    model: nn.Module,
    *,
    kind: str = "adamw",
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Decay = "matrices",
    momentum: float = 0.95,
    factor_rates: FactorRates = "equal",
    base_width: int | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over every trainable parameter of ``model``, a tied one once.

    Args:
        kind: ``adamw``, ``torch.optim.AdamW`` itself; ``muon``, Muon for the weights of attention
            and FFN, dense or factors, and of guides, and AdamW for the rest; ``spectron`` and
            ``lora_muon``, that rule where such a weight is two factors, else as ``muon``.
        decay: ``matrices`` decays parameters of two or more dimensions and spares biases and
            norms; ``all`` decays everything (the rule of arXiv 2407.09835).
        momentum: of Muon, Spectron and LoRA-Muon; ``betas`` and ``eps`` are AdamW's.
        factor_rates: ``structure_aware``, with ``adamw`` only, multiplies the rate of each factor
            by its ``factor_multipliers``. In a model without decoder layers these are the factors
            of every structured linear in it.
        base_width: with it, the hidden size that ``learning_rate`` was tuned at: the rate of every
            hidden weight is also multiplied by base_width / hidden size.

    Decay is decoupled: a step subtracts learning_rate x weight_decay x parameter, without the
    multiplier. Beside what PyTorch reads, a group has ``names``, the parameters' names as files
    have them, and ``rate_multiplier``: its ``lr`` is to be the rate times that, on a schedule too.

    Raises ``ConfigError`` for an unknown kind, for values that are wrong or do not go together, and
    for a kind other than ``adamw`` where the model has no weight that it would train.
    """
    chosen = kind_named(kind)
    _check_numbers(learning_rate, weight_decay, decay)
    _check_rates(kind, chosen, factor_rates, base_width)
    found = members(model)
    width = width_multiplier(model, base_width)
    _check_members(model, kind, chosen, found, factor_rates)
    options = {"betas": betas, "eps": eps, "momentum": momentum}
    groups: dict[tuple[str, float, float], Group] = {}
    for member in found:
        own_decay = weight_decay if decay == "all" or member.parameter.ndim >= 2 else 0.0
        scaled = factor_rates == "structure_aware" and member.role != "other"
        multiplier = member.multiplier * width if scaled else 1.0
        key = (chosen.rules[member.role], own_decay, multiplier)
        group = groups.setdefault(key, _empty_group(*key, learning_rate, options))
        group["params"].append(member.parameter)
        group["names"].append(member.name)
    made = list(groups.values())
    if not chosen.is_adamw:
        return FactorOptimizer(made, lr=learning_rate)
    adamw = RULES["adamw"]
    adamw.admit(adamw.options | made[0])  # our errors come before PyTorch's
    fused = has_fused_kernel(member.parameter for member in found) or None  # None: PyTorch's choice
    return torch.optim.AdamW(made, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def _empty_group(
    rule: str, decay: float, multiplier: float, rate: float, options: Mapping[str, Any]
) -> Group:
    """``decay`` is relative to ``rate``; a rule subtracts relative to the group's own ``lr``."""
    own = {key: value for key, value in options.items() if key in RULES[rule].options}
    return own | {
        "params": [],
        "names": [],
        "rule": rule,
        "lr": rate * multiplier,
        "rate_multiplier": multiplier,
        "weight_decay": decay / multiplier,
    }


def _check_numbers(learning_rate: float, weight_decay: float, decay: str) -> None:
    check(learning_rate >= 0, f"learning_rate={learning_rate} must be at least 0")
    check(weight_decay >= 0, f"weight_decay={weight_decay} must be at least 0")
    check(decay in get_args(Decay), f"decay={decay!r} must be one of {get_args(Decay)}")


def _check_rates(kind: str, chosen: Kind, factor_rates: str, base_width: int | None) -> None:
    known = get_args(FactorRates)
    check(factor_rates in known, f"factor_rates={factor_rates!r} must be one of {known}")
    if factor_rates == "equal":
        check(base_width is None, f"base_width={base_width} needs factor_rates='structure_aware'")
        return
    check(
        chosen.is_adamw,
        f"factor_rates='structure_aware' is for optimizer.kind='adamw', not {kind!r}",
    )


def _check_members(
    model: nn.Module, kind: str, chosen: Kind, found: list[Member], factor_rates: str
) -> None:
    name = type(model).__name__
    check(bool(found), f"{name} has no parameter to train")
    check(
        chosen.is_adamw or any(chosen.rules[member.role] != "adamw" for member in found),
        f"optimizer.kind={kind!r}: no trainable weight of attention or FFN was found in "
        f"{name}; use 'adamw', or FactorOptimizer with groups of your own",
    )
    check(
        factor_rates == "equal" or any(member.role != "other" for member in found),
        f"factor_rates={factor_rates!r}: no trainable weight of attention or FFN and no factor was "
        f"found in {name}, so all rates would be equal",
    )

"""Letting go of parameters that are no longer trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from factorlm.optim.rule import RULES, Group

_PER_PARAMETER = ("params", "names", "param_names")
"""Keys of a group that hold one item for each of its parameters."""


def release_(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take ``parameters`` out of the groups of ``optimizer``, and free their state.

    Any PyTorch optimizer. Those that it does not hold are passed over. A group stays where its
    last parameter goes: learning-rate schedulers count groups. Raises ``ConfigError``, before
    anything is changed, if one factor of a pair would be left.
    """
    released = {id(parameter): parameter for parameter in parameters}
    kept = [_without(group, released) for group in optimizer.param_groups]
    for group, left in zip(optimizer.param_groups, kept, strict=True):
        group.update(left)
    for parameter in released.values():
        optimizer.state.pop(parameter, None)


def _without(group: Group, released: dict[int, Tensor]) -> Group:
    """The lists of ``group`` that go by parameter, without those released."""
    stays = [id(parameter) not in released for parameter in group["params"]]
    left = {
        key: [item for item, stay in zip(group[key], stays, strict=True) if stay]
        for key in _PER_PARAMETER
        if key in group
    }
    if "rule" in group:
        RULES[group["rule"]].check_group(group | left)
    return left

"""``Rule``: how a group of parameters is updated; the registry of rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from typing import Any, ClassVar, TypeAlias, final

from torch import Tensor

from factorlm.config import check
from factorlm.registry import Registry

Group: TypeAlias = dict[str, Any]
"""A parameter group of ``torch.optim.Optimizer``: ``params``, ``lr``, and a rule's options."""
State: TypeAlias = MutableMapping[Tensor, dict[str, Tensor]]
"""Parameter -> key -> tensor. A value of the parameter's own shape is sharded as it is; any other
is whole, and equal on all processes."""


class Rule(ABC):
    """One update rule. It has no state of its own and serves any number of groups.

    To add one: a file with a final subclass whose instance is registered in ``RULES``, and a line
    in ``factorlm/optim/__init__.py``.
    """

    name: ClassVar[str]
    """What a group's ``rule`` says."""
    options: ClassVar[dict[str, Any]]
    """What a group may set, besides ``params`` and ``lr``, and the values if it does not."""
    num_moments: ClassVar[int]
    """Tensors of a parameter's own size that its state holds."""

    @final
    def admit(self, group: Group) -> None:
        """Check a new group whose options are filled in, and settle what depends on its parameters.

        Raises ``ConfigError`` naming field, value and rule.
        """
        for field in ("lr", "weight_decay"):
            value = group[field]
            valid = isinstance(value, float | int) and value >= 0
            self.check(valid, field, value, "must be a number of at least 0")
        self.check_group(group)

    @final
    def check(self, condition: bool, field: str, value: object, rule: str) -> None:
        """Raise ``ConfigError`` unless ``condition`` holds for ``field`` of a group."""
        check(condition, f"{field}={value!r} of a group with rule='{self.name}' {rule}")

    @abstractmethod
    def check_group(self, group: Group) -> None:
        """What ``admit`` does beyond the learning rate and the decay."""

    @abstractmethod
    def update(self, group: Group, state: State) -> None:
        """One step, in place, of the group's parameters that have a gradient.

        Those without keep their values and their state. Runs without gradients, and may not wait
        for the device.
        """

    @abstractmethod
    def flops(self, shapes: Sequence[Sequence[int]]) -> int:
        """Matmul FLOPs of one ``update`` of parameters of these shapes, in the group's order."""


RULES: Registry[Rule] = Registry("optimizer rule")
"""What a group of ``FactorOptimizer`` names as its ``rule``."""

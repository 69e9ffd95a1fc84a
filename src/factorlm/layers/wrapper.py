"""What the wrappers of a structured layer share: names in files, weight and bias."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu

from factorlm.layers.base import StructuredLinear

_WRAPPER_PARTS = frozenset({"structured", "_orig_mod", "_checkpoint_wrapped_module"})


def saved_name(name: str) -> str:
    """A module's or parameter's name as files have it, the parts that wrappers add left out."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


class StructuredWrapper(nn.Module, ABC):
    """A module in the place of ``structured``, which it holds.

    In state dicts ``structured`` has the names that it has alone (``V``, ``bias``), so that files
    with and without the wrapper agree.
    """

    def __init__(self, structured: StructuredLinear) -> None:
        super().__init__()
        self.structured = structured
        self.register_state_dict_post_hook(_named_as_saved)
        self.register_load_state_dict_pre_hook(_named_as_held)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""

    def forward_gelu(self, x: Tensor) -> Tensor:
        """gelu(self(x)), (*, I) -> (*, O), as a ``StructuredLinear`` has it."""
        return gelu(self(x))

    @property
    def weight(self) -> Tensor:
        """The structured map as a detached dense weight, (O, I); see ``StructuredLinear``."""
        return self.structured.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, (O,), of ``structured``."""
        return self.structured.bias


def _named_as_saved(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object
) -> None:
    """Leave ``structured`` out of the names of a state dict that was just made, in its order."""
    held = f"{prefix}structured."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        state_dict[prefix + key[len(held) :] if key.startswith(held) else key] = value


def _named_as_held(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: object
) -> None:
    """The reverse, on a state dict that is about to be loaded."""
    parts = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if not key.startswith(parts):
            state_dict[f"{prefix}structured.{key[len(prefix) :]}"] = state_dict.pop(key)

"""A dense layer that keeps its weight packed beside it, for inference on a CPU."""

from __future__ import annotations

from typing import Any, Self, final

import torch
from torch import Tensor, nn

from factorlm.layers.copies import KeptCopy, watchable_tensors
from factorlm.ops.packed import can_pack, linear_packed, pack, takes_packed


@final
class PackedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by a packed copy of its weight (``factorlm.ops.packed``).

    The copy serves calls in eval mode without gradients, and is made and dropped as that of
    ``PreMergedLinear`` is. Everything else is ``nn.Linear``'s: names, parameters, other calls.
    """

    _packed: KeptCopy

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed = KeptCopy()

    @classmethod
    def pack_(cls, layer: nn.Linear) -> None:
        """Let ``layer`` be one, in place."""
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer._packed = KeptCopy()

    def unpack_(self) -> None:
        """Let it be the ``nn.Linear`` that it was, in place."""
        del self._packed
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return super().forward(x)
        tensors = None if torch.is_autocast_enabled("cpu") else watchable_tensors(self)
        if tensors is None or not can_pack(self.weight):
            return super().forward(x)
        if not takes_packed(x, self.weight, self.bias):
            return super().forward(x)
        (packed,) = self._packed.get(tensors, lambda: (pack(self.weight),))
        return linear_packed(x, packed, self.bias)

    @property
    def has_copy(self) -> bool:
        """Whether memory is held for a packed copy now."""
        return self._packed.exists

    def invalidate(self) -> None:
        """Drop the copy: for a write that PyTorch does not count."""
        self._packed.drop()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training drops the copy."""
        if mode:
            self.invalidate()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.invalidate()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = KeptCopy()

"""One view of the three kinds of linear layer: ``nn.Linear``, GPT-2's ``Conv1D``, structured."""

from __future__ import annotations

from typing import TypeAlias, TypeGuard

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factorlm.layers import StructuredLinear

LinearModule: TypeAlias = nn.Linear | Conv1D | StructuredLinear
"""What counts as a linear layer."""


def is_linear(module: nn.Module) -> TypeGuard[LinearModule]:
    """Whether ``module`` maps (*, I) to (*, O) by one weight: dense, transposed or structured."""
    return isinstance(module, nn.Linear | Conv1D | StructuredLinear)


def linear_sizes(module: LinearModule) -> tuple[int, int]:
    """``(in_features, out_features)``."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def linear_kind(module: LinearModule) -> str:
    """``linear``, ``conv1d`` or the registered name of a structure."""
    if isinstance(module, StructuredLinear):
        return module.config.kind
    return "conv1d" if isinstance(module, Conv1D) else "linear"


def linear_num_params(module: LinearModule) -> int:
    """Number of weights, without bias."""
    in_features, out_features = linear_sizes(module)
    if isinstance(module, StructuredLinear):
        return module.config.num_params(in_features, out_features)
    return in_features * out_features


def dense_weight(module: LinearModule) -> Tensor:
    """The dense weight, (O, I), whatever the layout it is kept in."""
    if isinstance(module, StructuredLinear):
        return module.to_dense()
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def dense_bias(module: LinearModule) -> Tensor | None:
    """The bias, (O,), or None."""
    return module.bias

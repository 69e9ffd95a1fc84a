"""Matmuls with a weight that oneDNN keeps in an order of its own, on a CPU.

A plain weight is read in the order it lies in, or put in another one in every call. One that is
packed once is read at the speed of memory: what a matmul with few tokens is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from factorlm.measure import has_fast_bf16
from factorlm.ops.observed import is_observed

TYPICAL_TOKENS = 16
"""What oneDNN is told to expect. The order that it chooses serves other counts as well."""


def can_pack(weight: Tensor) -> bool:
    """Whether ``weight`` can be packed: (O, I) in float32, or in bf16 where the CPU computes in
    it, and torch was built with oneDNN."""
    if weight.device.type != "cpu" or weight.dim() != 2 or weight.numel() == 0:
        return False
    return _has_onednn() and (
        weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_fast_bf16("cpu"))
    )


def pack(weight: Tensor) -> Tensor:
    """``weight`` (O, I) in oneDNN's order: an opaque tensor for ``linear_packed``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS)
    return packed


def takes_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``linear_packed`` does with these what ``linear`` does, once ``weight`` is packed.

    Not for an ``x`` that is no plain tensor, nor one that ``linear`` refuses, in words that are
    clearer. Nor where someone follows PyTorch's operators, who would not see this one.
    """
    dtype = weight.dtype
    return (
        type(x) is Tensor
        and not is_observed()
        and x.is_cpu
        and x.layout == torch.strided
        and not x.is_nested
        and x.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and x.shape[-1:] == weight.shape[-1:]
    )


def linear_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, I), ``weight`` (O, I), plain or of ``pack``, bias (O,) -> (*, O), all of one dtype.

    Not seen by autograd where the weight is packed.
    """
    if not weight.is_mkldnn:
        return linear(x, weight, bias)
    bias = bias if bias is None else bias.contiguous()  # the operator does not look at strides
    y: Tensor = _multiply()(x.contiguous(), weight, bias, "none", [], "")
    return y


@functools.cache
def _multiply() -> Callable[..., Tensor]:
    """The operator without the search for an overload in every call."""
    operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return operator


@functools.cache
def _has_onednn() -> bool:
    """The two operators are those that torch's own compiler packs weights with; builds without
    oneDNN have neither."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    known = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return known and torch.backends.mkldnn.is_available()

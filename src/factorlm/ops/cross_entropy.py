"""Cross entropy of a linear head, in chunks of tokens: the logits never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorlm.ops.autocast import matmul_dtype

IGNORE_INDEX = -100
"""Label of a position that is not predicted."""

CHUNK_ELEMENTS = 2**25
"""Largest number of logits that exist at once (128 MiB in float32)."""


def linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,), IGNORE_INDEX where nothing is predicted
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Sum of nats over all labels that are not ``IGNORE_INDEX``, a float32 scalar.

    Logits are z = scale (hidden weightᵀ + bias), then softcap·tanh(z/softcap) where ``softcap`` is
    given (Gemma 2, arXiv 2408.00118, section 2). Gradients are computed chunk by chunk in the
    forward pass, so the matmul FLOPs equal those of the unchunked loss. Matmuls run in the
    autocast dtype; the softmax and the sums in float32 (float64 for float64 inputs).
    """
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, scale, softcap, chunk_elements, torch.is_grad_enabled()
    )
    return loss


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        chunk_elements: int,
        grad_enabled: bool,
    ) -> Tensor:
        dtype = matmul_dtype(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = max(1, chunk_elements // weight.shape[0])
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        needs[2] = needs[2] and bias is not None
        sums = _GradientSums(*needs)
        head = weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                chunk = slice(start, start + rows)
                x, target = hidden[chunk].to(dtype), labels[chunk]
                logits = _logits(x, head, bias, wide, scale)
                loss, slope = _chunk_loss(logits, target, softcap, any(needs))
                total += loss
                if slope is not None:
                    sums.add(slope if scale == 1.0 else slope.mul_(scale), x, head)
        ctx.save_for_backward(*sums.gradients())
        ctx.dtypes = [x.dtype if x is not None else None for x in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        scaled = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _logits(
    x: Tensor, head: Tensor, bias: Tensor | None, wide: torch.dtype, scale: float
) -> Tensor:
    """scale (x headᵀ + bias), (rows, V), in ``wide``; the matmul in x's dtype."""
    logits = (x @ head.t()).to(wide)
    if bias is not None:
        logits += bias
    return logits if scale == 1.0 else logits.mul_(scale)


def _chunk_loss(
    logits: Tensor, target: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of a chunk and its gradient in the logits, both in the logits' dtype."""
    z = logits if softcap is None else _capped(logits, softcap)
    valid = target != IGNORE_INDEX
    index = target.where(valid, 0).unsqueeze(1)
    log_p = torch.log_softmax(z, dim=1)
    loss = -(log_p.gather(1, index).squeeze(1) * valid).sum()
    if not needs_grad:
        return loss, None
    slope = log_p.exp_()
    slope.scatter_add_(1, index, slope.new_full((1, 1), -1.0).expand(index.shape))
    slope *= valid.unsqueeze(1)
    if softcap is not None:
        slope *= 1 - (z / softcap) ** 2  # tanh' = 1 - tanh²
    return loss, slope


class _GradientSums:
    """The gradients of hidden, weight and bias, as the chunks give them."""

    def __init__(self, hidden: bool, weight: bool, bias: bool) -> None:
        self._needs = hidden, weight, bias
        self._hidden: list[Tensor] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, slope: Tensor, x: Tensor, head: Tensor) -> None:
        """The part of one chunk: ``slope`` (rows, V), ``x`` (rows, H), ``head`` (V, H)."""
        narrow = slope.to(x.dtype)
        if self._needs[0]:
            self._hidden.append(narrow @ head)
        if self._needs[1]:
            part = (narrow.t() @ x).to(slope.dtype)
            self._weight = part if self._weight is None else self._weight.add_(part)
        if self._needs[2]:
            part = slope.sum(0)
            self._bias = part if self._bias is None else self._bias.add_(part)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each None where it is not needed."""
        if not self._hidden:
            return None, self._weight, self._bias
        whole = self._hidden[0] if len(self._hidden) == 1 else torch.cat(self._hidden)
        return whole, self._weight, self._bias

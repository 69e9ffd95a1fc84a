"""No number before the result is right: layers against a dense product in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.errors import NumericError
from factorlm.layers import SelfGuidedLinear, StructuredLinear

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative error, in Frobenius norm, of an output or a gradient."""


def check_linear(layer: StructuredLinear, x: Tensor) -> None:
    """The layer's output and gradients on ``x`` (N, I) equal those of ``to_dense`` in float64.

    Raises ``NumericError`` naming the first that does not.
    """
    exact = copy.deepcopy(layer).double()
    truth = x.detach().double().requires_grad_()
    bias = exact.bias
    _compare(layer, x, exact, truth, linear(truth, exact.to_dense(), bias))


def check_guided(layer: SelfGuidedLinear, x: Tensor) -> None:
    """The same for α W + (1 - α) S, both maps on every token."""
    exact = copy.deepcopy(layer).double()
    truth = x.detach().double().requires_grad_()
    guided = linear(truth, exact.guide.weight, exact.bias)
    plain = linear(truth, exact.structured.to_dense(), exact.bias)
    _compare(layer, x, exact, truth, torch.lerp(plain, guided, exact.alpha))


def _compare(layer: nn.Module, x: Tensor, exact: nn.Module, truth: Tensor, wanted: Tensor) -> None:
    x = x.detach().requires_grad_()
    found = layer(x)
    cotangent = torch.linspace(-1, 1, found.numel(), device=x.device).view_as(found)
    cotangent = cotangent.to(found.dtype)  # as rounded: sums of it, a bias's gradient, cancel
    names = ["x", *dict(layer.named_parameters())]
    gradients = torch.autograd.grad(found, [x, *layer.parameters()], cotangent)
    expected = torch.autograd.grad(wanted, [truth, *exact.parameters()], cotangent.double())
    _check("output", found, wanted, x.dtype)
    for name, mine, theirs in zip(names, gradients, expected, strict=True):
        _check(f"gradient of {name}", mine, theirs, x.dtype)


def _check(what: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        error = float(torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted))
    if not error <= TOLERANCES[dtype]:
        raise NumericError(
            f"{what} is off by {error:.2g} of its norm in {dtype}, over {TOLERANCES[dtype]:g}: "
            "nothing was timed"
        )

"""No number before the result is right: what is timed, against dense products in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.bench.cases import require_close
from factorlm.layers import SelfGuidedLinear, StructuredLinear

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative error, in Frobenius norm, of an output or a gradient."""
CHECKED_TOKENS = 256
"""Of which results are compared. All tokens go through the layer, which may choose its path by
their number."""

Run = Callable[[Tensor], Tensor]


def check_layer(layer: nn.Module, x: Tensor, run: Run | None = None) -> None:
    """What ``layer``, or ``run`` if that is another form of it, makes of x (N, I) is right.

    Its output, with and without gradients, and its gradients equal those of ``naive(layer)`` on
    tokens from the first to the last. Raises ``NumericError`` naming the first that does not.
    """
    run = layer if run is None else run
    exact, rows = naive(layer), _rows(x)
    truth = x.detach()[rows].double().requires_grad_()
    wanted = exact(truth)
    with torch.no_grad():
        _check("output without gradients", run(x)[rows], wanted, x.dtype)
    leaf = x.detach().requires_grad_()
    found = run(leaf)
    _check("output", found[rows], wanted, x.dtype)
    cotangent = torch.linspace(-1, 1, wanted.numel(), device=x.device).view_as(wanted)
    cotangent = cotangent.to(found.dtype)  # as rounded: sums of it, a bias's gradient, cancel
    slope = torch.zeros_like(found).index_copy(0, rows, cotangent)
    gradients = torch.autograd.grad(found, [leaf, *layer.parameters()], slope)
    expected = torch.autograd.grad(wanted, [truth, *exact.parameters()], cotangent.double())
    names = ["x", *dict(layer.named_parameters())]
    for name, mine, theirs in zip(names, gradients, expected, strict=True):
        mine = mine[rows] if name == "x" else mine
        _check(f"gradient of {name}", mine, theirs, x.dtype)


@torch.no_grad()
def check_outputs(run: Run, layer: nn.Module, x: Tensor) -> None:
    """The same for what ``run`` makes of x (N, I) without gradients alone."""
    rows = _rows(x)
    wanted = naive(layer)(x[rows].double())
    _check("output without gradients", run(x)[rows], wanted, x.dtype)


def naive(layer: nn.Module) -> nn.Module:
    """A copy in float64 in which structured layers multiply by their ``to_dense``, and guided ones
    compute both maps on every token."""
    exact = copy.deepcopy(layer).double()
    for module in exact.modules():
        if isinstance(module, StructuredLinear):
            module.forward = partial(_dense_product, module)  # type: ignore[method-assign]
        elif isinstance(module, SelfGuidedLinear):
            module.forward = partial(_guided_product, module)  # type: ignore[method-assign]
    return exact


def _dense_product(layer: StructuredLinear, x: Tensor) -> Tensor:
    return linear(x, layer.to_dense(), layer.bias)


def _guided_product(layer: SelfGuidedLinear, x: Tensor) -> Tensor:
    guided = linear(x, layer.guide.weight, layer.bias)
    return torch.lerp(_dense_product(layer.structured, x), guided, layer.alpha)


def _rows(x: Tensor) -> Tensor:
    """The places of up to ``CHECKED_TOKENS`` tokens of x (N, I)."""
    return spread_places(len(x), min(len(x), CHECKED_TOKENS), x.device)


def spread_places(total: int, count: int, device: torch.device) -> Tensor:
    """``count`` places of ``total``, from the first to the last."""
    return torch.arange(count, device=device) * (total - 1) // max(count - 1, 1)


def _check(what: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        error = float(torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted))
    require_close(f"{what} in {dtype}", error, TOLERANCES[dtype])

"""The matmuls that layers cannot do without, and nothing else: what their times are held against.

Letters: N = tokens, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from factorlm.bench.options import Pass
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, StructuredLinear
from factorlm.ops.block_diagonal import block_gradients, multiply_panels

KNOWN = (LowRankConfig, BlockShuffleConfig, BlockDenseConfig)
"""Structures that multiply by their factors in turn."""


def bare(name: str) -> str:
    """The case beside ``name``: ``low_rank, bare matmuls``."""
    return f"{name}, bare matmuls"


def factors_of(*layers: nn.Module) -> tuple[Tensor, ...]:
    """What ``layers``, one after the other, multiply by: matrices (b, a) and blocks (G, b, a).

    Empty where one of them is neither dense nor of a ``KNOWN`` structure.
    """
    found: list[Tensor] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            found.append(layer.weight)
        elif isinstance(layer, StructuredLinear) and isinstance(layer.config, KNOWN):
            found.extend(layer.get_parameter(factor.name) for factor in layer.factors)
        else:
            return ()
    return tuple(found)


def bare_matmuls(
    factors: Sequence[Tensor], x: Tensor, slope: Tensor, kind: Pass
) -> Callable[[], object]:
    """A product of x (N, I) with each factor in turn; with a backward pass also two for each,
    from slope (N, O). All into new memory, as autograd has to.

    Values of blocks are not shuffled in between: block_shuffle computes others, of these sizes.
    Returns the output, then the gradients of factor and input, from the last factor to the first.
    """

    @torch.no_grad()
    def run() -> list[Tensor]:
        inputs = [x]
        for factor in factors:
            inputs.append(_product(inputs[-1], factor))
        results = [inputs.pop()]
        if kind == "forward":
            return results
        grad = slope
        for factor in reversed(factors):
            results.append(_factor_gradient(grad, inputs.pop(), factor))
            grad = _input_gradient(grad, factor)
            results.append(grad)
        return results

    return run


def _product(x: Tensor, factor: Tensor) -> Tensor:
    if factor.dim() == 2:
        return x @ factor.t()
    return multiply_panels(x, factor.transpose(1, 2))


def _input_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    return grad @ factor if factor.dim() == 2 else multiply_panels(grad, factor)


def _factor_gradient(grad: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return grad.t() @ x if factor.dim() == 2 else block_gradients(grad, x, factor)

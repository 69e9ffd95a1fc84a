"""What the rules for matrices share: momentum, the scale of a rate, and how shards are updated.

A parameter may be a ``DTensor`` (FSDP2). Its momentum is sharded as it is; a matrix is gathered
only to be orthogonalised, which every process does alike, and each keeps its part of the update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from torch import Tensor, zeros_like
from torch.distributed.tensor import DTensor, distribute_tensor

from factorlm.optim.newton_schulz import Precision, newton_schulz, working_dtype
from factorlm.optim.rule import Group, Rule

MATRIX_OPTIONS: dict[str, Any] = {
    "weight_decay": 0.1,
    "momentum": 0.95,
    "precision": "auto",
    "adjust_lr_fn": "match_rms_adamw",
}
"""Options, and their values where a group sets none: decay, relative to the rate; μ of the Nesterov
momentum; the dtype of Newton-Schulz (``working_dtype``); how sizes scale the rate."""


def nesterov_momentum(parameter: Tensor, state: dict[str, Tensor], group: Group) -> Tensor:
    """Add the gradient to the momentum: B ← μ B + (1 - μ) g; then (1 - μ) g + μ B, sharded as the
    parameter is. As in ``torch.optim.Muon``."""
    momentum, gradient = group["momentum"], parameter.grad
    assert gradient is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = zeros_like(parameter)
    buffer = state["momentum_buffer"]
    buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp(buffer, momentum)


def orthogonal_momentum(parameter: Tensor, state: dict[str, Tensor], group: Group) -> Tensor:
    """The whole ``nesterov_momentum``, orthogonalised in the ``working_dtype`` of the group's
    ``precision``."""
    precision = group["precision"]
    ahead = nesterov_momentum(parameter, state, group)
    # Processes exchange no more than what is read.
    narrow = ahead.to(working_dtype(ahead, precision))
    return newton_schulz(whole(narrow), precision=precision)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def subtract_(parameter: Tensor, update: Tensor, *, rate: float, decay: float) -> None:
    """parameter ← (1 - decay) parameter - rate x update, of a whole ``update``."""
    local = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        mesh, placements = parameter.device_mesh, parameter.placements
        # Every process has the same update: it takes its own part, and nothing is sent.
        update = distribute_tensor(update, mesh, placements, src_data_rank=None).to_local()
    local.mul_(1 - decay)
    local.add_(update, alpha=-rate)


def rms_of_adamw(rate: float, sizes: Iterable[int]) -> float:
    """``rate`` x 0.2 √(the larger size): an orthogonal update of these sizes then has the RMS that
    AdamW's updates have at ``rate`` (arXiv 2502.16982)."""
    return rate * (0.2 * math.sqrt(max(sizes)))


def check_matrices(rule: Rule, group: Group) -> None:
    """Refuse parameters that are not matrices or stacks of them, and wrong options."""
    for parameter in group["params"]:
        shape = tuple(parameter.shape)
        rule.check(len(shape) >= 2, "shape", shape, "must have two dimensions or more")
        rule.check(parameter.numel() > 0, "shape", shape, "must not be empty")
        dtype = parameter.dtype
        rule.check(not dtype.is_complex, "dtype", dtype, "must be real")
    momentum, precision = group["momentum"], group["precision"]
    rule.check(0 <= momentum < 1, "momentum", momentum, "must lie in [0, 1)")
    known = get_args(Precision)
    rule.check(precision in known, "precision", precision, f"must be one of {known}")


def pairs(parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """[first, second, first, second, ...] two by two."""
    return zip(parameters[::2], parameters[1::2], strict=True)


def pair_limit(rate: float, adjust_lr_fn: str | None, pair: tuple[Tensor, Tensor]) -> float:
    """η, how far a product moves in spectral norm: ``rate``, or with ``match_rms_adamw`` what
    ``rms_of_adamw`` makes of it by the sizes of the product."""
    if adjust_lr_fn is None:
        return rate
    first, second = pair
    return rms_of_adamw(rate, (_widths(first.shape)[0], _widths(second.shape)[1]))


def check_pairs(rule: Rule, group: Group) -> None:
    """Refuse what is not in pairs that can be multiplied, and an unknown ``adjust_lr_fn``."""
    adjust, known = group["adjust_lr_fn"], "must be 'match_rms_adamw' or None"
    rule.check(adjust in ("match_rms_adamw", None), "adjust_lr_fn", adjust, known)
    number = len(group["params"])
    rule.check(number % 2 == 0, "len(params)", number, "must be even: factors come in pairs")
    for pair in pairs(group["params"]):
        (_, between), (read, _) = (_widths(factor.shape) for factor in pair)
        shapes = [tuple(factor.shape) for factor in pair]
        text = f"must be a pair in order of application; {between} outputs meet {read} inputs"
        rule.check(between == read, "shapes", shapes, text)


def _widths(shape: Sequence[int]) -> tuple[int, int]:
    """(inputs, outputs) of all blocks."""
    num_blocks = math.prod(shape[:-2])
    return num_blocks * shape[-1], num_blocks * shape[-2]

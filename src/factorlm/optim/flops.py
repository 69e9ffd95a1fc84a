"""What optimizers cost, before they are built: matmul FLOPs and bytes of state."""

from __future__ import annotations

from torch import nn

from factorlm.optim.kinds import kind_named
from factorlm.optim.members import members
from factorlm.optim.rule import RULES


def optimizer_flops(model: nn.Module, kind: str) -> int:
    """Matmul FLOPs of one step of the optimizer ``kind`` over all that trains, guides left out.

    AdamW is elementwise and takes 0; Newton-Schulz counts once, also where several processes
    repeat it. ``model`` may be on the meta device. Raises ``ConfigError`` for an unknown kind.
    """
    rules = kind_named(kind).rules
    shapes: dict[str, list[tuple[int, ...]]] = {rule: [] for rule in rules.values()}
    for member in members(model):
        if member.role != "guide":
            shapes[rules[member.role]].append(tuple(member.parameter.shape))
    return sum(RULES[rule].flops(found) for rule, found in shapes.items())


def guide_optimizer_flops(in_features: int, out_features: int, kind: str) -> int:
    """Matmul FLOPs that a step of the optimizer ``kind`` takes for a guide of these sizes."""
    rule = kind_named(kind).rules["guide"]
    return RULES[rule].flops([(out_features, in_features)])


def optimizer_state_bytes(model: nn.Module, kind: str) -> int:
    """Bytes of the moments that the optimizer ``kind`` keeps, those of guides included.

    Two for each parameter of AdamW, one for Muon, Spectron and LoRA-Muon; vectors and counters are
    left out. Raises ``ConfigError`` for an unknown kind.
    """
    rules = kind_named(kind).rules
    return sum(
        RULES[rules[member.role]].num_moments * member.parameter.nbytes for member in members(model)
    )

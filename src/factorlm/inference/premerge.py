"""``premerge_`` and its inverse ``unpremerge_``: merged copies for the layers that gain by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from factorlm.config import check
from factorlm.inference.latency import LatencyTable, LayerCase, cached_table
from factorlm.inference.packing import packed_bytes
from factorlm.inference.roofline import estimated_table
from factorlm.layers import MergePolicy, PreMergedLinear, SelfGuidedLinear, StructuredLinear
from factorlm.surgery import replace_everywhere
from factorlm.surgery.swap import check_not_premerged

Source = Literal["given", "measured", "estimated"]


@dataclass(frozen=True, kw_only=True)
class PremergeRow:
    """What was decided for one layer."""

    name: str
    case: LayerCase
    policy: MergePolicy
    """The token counts at which a merged copy would be used."""
    source: Source
    """Where the policy is from: the caller, a measured table, or the formula."""
    saved_ms_per_token: float
    """By the table; see ``LatencyTable.saved_ms_per_token``."""
    merged: bool
    """Whether the layer keeps a merged copy."""
    copy_bytes: int
    """What all copies of the layer take once they are there: the merged one and, where the policy
    leaves token counts to factors that can be packed, those. 0 without a merged copy."""

    @property
    def reason(self) -> str:
        """The decision in words."""
        if self.merged:
            return f"merged at tokens {self.policy}"
        return "over the budget" if self.policy.ever_merges else "never faster merged"


@dataclass(frozen=True)
class PremergeReport:
    """The structured layers of a model, in its order. ``print`` gives a table."""

    rows: tuple[PremergeRow, ...]

    @property
    def copy_bytes(self) -> int:
        """Memory of the copies once all are there, merged ones and packed factors."""
        return sum(row.copy_bytes for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"{row.name:<{width}}  {row.case}  {row.source}: {row.reason}" for row in self.rows
        ]
        num_merged = sum(row.merged for row in self.rows)
        end = f"{num_merged} of {len(self.rows)} layers keep a merged copy"
        return "\n".join([*lines, f"{end}; all copies: {self.copy_bytes:,} bytes"])


def premerge_(
    model: nn.Module,
    policy: MergePolicy | Mapping[LayerCase, LatencyTable] | None = None,
    *,
    memory_budget_bytes: int | None = None,
) -> PremergeReport:
    """Let structured layers of ``model`` keep merged copies, in place, and say which.

    They compute what they computed, up to rounding, and are saved as before. The copies are
    made by the first calls in eval mode without gradients (``PreMergedLinear`` says when one is
    used and what drops it). A layer that no token count makes faster gets none.

    Args:
        policy: one for all layers, or what ``tune`` returned. None takes the table that
            ``factorlm tune`` left in the cache, for each layer that has one on this machine. Where
            there is no table a formula decides, and also beyond the last token count of one whose
            merged copies are faster to the end.
        memory_budget_bytes: what the copies may take together; None is no limit. The layers that
            save most time per byte come first. Factors that a CPU packs for the token counts that
            take no merged copy (``factorlm.ops.packed``) count too. What oneDNN adds to fill its
            blocks of rows and columns does not.

    A model without structured layers is left as it is. Raises ``ConfigError`` for a model on the
    meta device, or one that has guides, or structured layers with merged or packed copies already.
    """
    budget = memory_budget_bytes
    check(budget is None or budget >= 0, f"memory_budget_bytes={budget} must be at least 0")
    layers = _layers(model)
    cases = {name: LayerCase.of(layer) for name, layer in layers.items()}
    examples = {cases[name]: layer for name, layer in layers.items()}
    decisions = {case: _decide(case, layer, policy) for case, layer in examples.items()}
    chosen = _within(budget, cases, decisions)
    for name in chosen:
        layer = layers[name]
        replace_everywhere(model, layer, PreMergedLinear(layer, decisions[cases[name]].policy))
    return PremergeReport(
        tuple(_row(name, case, decisions[case], name in chosen) for name, case in cases.items())
    )


def unpremerge_(model: nn.Module) -> list[str]:
    """Take all merged copies off, in place; the names of the layers that had one."""
    layers = premerged_layers(model)
    for layer in layers.values():
        replace_everywhere(model, layer, layer.structured)
    return list(layers)


def premerged_layers(model: nn.Module) -> dict[str, PreMergedLinear]:
    """The layers of ``model`` that may keep a merged copy, by name; a shared one once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreMergedLinear)
    }


@dataclass(frozen=True)
class _Decision:
    policy: MergePolicy
    source: Source
    saved_ms_per_token: float
    copy_bytes: int


def _layers(model: nn.Module) -> dict[str, StructuredLinear]:
    """The layers to decide on, by name. A ``dense`` one is its own merged copy."""
    kind = type(model).__name__
    check_not_premerged(model)
    guided = any(isinstance(module, SelfGuidedLinear) for module in model.modules())
    check(not guided, f"{kind} has guides attached: detach_guides_ first")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }
    check("" not in layers, "the model itself is the layer: use PreMergedLinear")
    meta = any(tensor.is_meta for layer in layers.values() for tensor in layer.parameters())
    check(not meta, f"{kind} is on the meta device: load it first")
    return {name: layer for name, layer in layers.items() if LayerCase.of(layer).has_factors}


def _decide(
    case: LayerCase,
    layer: StructuredLinear,
    given: MergePolicy | Mapping[LayerCase, LatencyTable] | None,
) -> _Decision:
    """The policy of ``case``, what it saves by the table and takes in copies; ``layer`` is one."""
    measured = given.get(case) if isinstance(given, Mapping) else cached_table(case)
    estimated = estimated_table(case)
    table = estimated if measured is None else measured.extended_by(estimated)
    source: Source = "estimated" if measured is None else "measured"
    policy = table.policy
    if isinstance(given, MergePolicy):
        policy, source = given, "given"
    factors = 0 if all(policy.merged) else packed_bytes(layer)
    saved = table.saved_ms_per_token(policy)
    return _Decision(policy, source, saved, case.copy_bytes + factors)


def _row(name: str, case: LayerCase, decision: _Decision, merged: bool) -> PremergeRow:
    return PremergeRow(
        name=name,
        case=case,
        policy=decision.policy,
        source=decision.source,
        saved_ms_per_token=decision.saved_ms_per_token,
        merged=merged,
        copy_bytes=decision.copy_bytes if merged else 0,
    )


def _within(
    budget: int | None, cases: Mapping[str, LayerCase], decisions: Mapping[LayerCase, _Decision]
) -> set[str]:
    """The names of the layers that get copies: most time saved per byte first, then in order."""
    wanting = [name for name, case in cases.items() if decisions[case].policy.ever_merges]
    wanting.sort(
        key=lambda name: (
            -decisions[cases[name]].saved_ms_per_token / decisions[cases[name]].copy_bytes
        )
    )
    chosen: set[str] = set()
    used = 0
    for name in wanting:
        need = decisions[cases[name]].copy_bytes
        if budget is None or used + need <= budget:
            chosen.add(name)
            used += need
    return chosen

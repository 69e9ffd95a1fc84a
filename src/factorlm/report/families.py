"""Which runs belong together: those that differ in size, data or seed, not in what they are.

The runs of a ladder say it themselves: ``config["labels"]`` names their ladder, family, size and
stage, ``main`` or ``tune``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from factorlm.records import RunRecord
from factorlm.report.compare import structure_label


def family_labels(runs: Sequence[RunRecord]) -> list[str]:
    """A family for each run: the one that it states, with its ladder where runs differ in that.

    Of a run that states none, its structure and the traits in which such runs differ:
    ``low_rank, 32%, full guide, muon``. Traits are the guide, the optimizer, its rates for
    factors, and the width of attention where it is not the model's. A rank is told by its share
    of the model's width where the recipe states both.
    """
    configs = [run.config for run in runs]
    ladders = {label_of(config, "ladder") for config in configs}
    unstated = [config for config in configs if not label_of(config, "family")]
    told = [
        trait
        for trait in (_guide, _optimizer, _attention)
        if len({trait(config) for config in unstated}) > 1
    ]
    return [
        _stated_family(config, has_many=len(ladders) > 1)
        or ", ".join(filter(None, [_structure(config), *(trait(config) for trait in told)]))
        for config in configs
    ]


def label_of(config: Mapping[str, Any], name: str) -> str:
    """One of the labels of a recipe: ``ladder``, ``family``, ``size``, ``stage``; else nothing."""
    labels = config.get("labels")
    return str(labels.get(name) or "") if isinstance(labels, Mapping) else ""


def _stated_family(config: Mapping[str, Any], *, has_many: bool) -> str:
    family, ladder = label_of(config, "family"), label_of(config, "ladder")
    return f"{family}, ladder {ladder}" if family and ladder and has_many else family


def _structure(config: dict[str, Any]) -> str:
    section = dict(config.get("structure", {}))
    rank, width = section.get("rank"), _stated(config).get("hidden_size")
    if isinstance(rank, int) and isinstance(width, int) and width > 0:
        section["rank"] = f"{rank / width:.0%} of width"
    return structure_label(section)


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the model that the recipe states over its preset."""
    return config.get("model", {}).get("overrides") or {}


def _guide(config: dict[str, Any]) -> str:
    variant = config.get("guide", {}).get("variant", "none")
    return "" if variant == "none" else f"{variant} guide"


def _optimizer(config: dict[str, Any]) -> str:
    section = config.get("optimizer", {})
    kind = str(section.get("kind", "adamw"))  # what there was before there was a choice
    rates = section.get("factor_rates", "equal")
    return kind if rates == "equal" else f"{kind}, {rates} rates"


def _attention(config: dict[str, Any]) -> str:
    """``attention 50% wide`` where the recipe states another width than the model's."""
    names = ("head_dim", "num_attention_heads", "hidden_size")
    sizes = [_stated(config).get(name) for name in names]
    head_dim, num_heads, hidden_size = (size if isinstance(size, int) else 0 for size in sizes)
    share = head_dim * num_heads / hidden_size if hidden_size else 0
    return "" if share in (0, 1) else f"attention {share:.0%} wide"

"""How a structured model is written down: in its ``config.json`` and in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factorlm.config import check
from factorlm.errors import did_you_mean
from factorlm.layers import StructureConfig, structure_from_target
from factorlm.surgery.targets import StructureMap

QUANT_METHOD = "factorlm"
"""What ``quantization_config.quant_method`` says in the ``config.json`` of a structured model."""
FORMAT_VERSION = 1
"""Of that block; raised when its meaning changes."""
GUIDED = "guided"
"""A key of that block which marks a checkpoint of a run whose guides are still there."""


def write_block(targets: Mapping[str, StructureConfig]) -> dict[str, Any]:
    """The ``quantization_config`` of a structured model: plain JSON that names no class."""
    plain = {name: config.to_target() for name, config in targets.items()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "targets": plain}


def read_block(block: Mapping[str, Any]) -> StructureMap:
    """Read what ``write_block`` wrote.

    Raises ``ConfigError`` for another format, a bad target, and a checkpoint that holds guides.
    """
    check(
        GUIDED not in block,
        f"quantization_config.{GUIDED}={block.get(GUIDED)}: a checkpoint of self-guided training, "
        "whose guides no model has: resume it by Trainer.train(resume_from_checkpoint=...) with "
        "the callback SelfGuidedTraining, and open what is saved once the guides are gone",
    )
    known = {"quant_method", "format_version", "targets"}
    for key in block:
        check(key in known, f"quantization_config: unknown key '{key}'.{did_you_mean(key, known)}")
    version = block.get("format_version")
    check(
        version == FORMAT_VERSION,
        f"quantization_config.format_version={version!r} is not readable here "
        f"(it reads {FORMAT_VERSION})",
    )
    targets = block.get("targets")
    check(
        isinstance(targets, Mapping), f"quantization_config.targets={targets!r} must be a mapping"
    )
    assert isinstance(targets, Mapping)
    return StructureMap.from_targets(targets)


def read_structure(section: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's ``structure`` section as arguments of ``build_causal_lm``.

    ``structure`` names a registered structure and its fields stand beside it, or ``layers`` maps
    names and patterns to such targets; ``param_ratio``, ``multiple_of`` and ``keep_first_dense``
    are passed on, where they are not null. An empty section gives ``{"structure": None}``: a dense
    model.
    """
    fields = dict(section)
    options = ("param_ratio", "multiple_of", "keep_first_dense")
    stated = {name: fields.pop(name, None) for name in options}
    arguments = {name: value for name, value in stated.items() if value is not None}
    layers = fields.pop("layers", None)
    if layers is None and not fields:
        check(not arguments, f"structure.structure must be named beside {', '.join(arguments)}")
        return {"structure": None}
    if layers is None:
        return {"structure": structure_from_target(fields)} | arguments
    check(not fields, f"structure.layers stands alone, without {', '.join(fields)}")
    check(isinstance(layers, Mapping), f"structure.layers={layers!r} must be a mapping")
    return {"structure": StructureMap.from_targets(layers)} | arguments

"""Structured linear layers behind one contract. Importing this package registers them all."""

from factorlm.layers.base import (
    STRUCTURES,
    Factor,
    StructureConfig,
    StructuredLinear,
    register_structure,
    structure_from_target,
)
from factorlm.layers.dense import DenseConfig, DenseLinear
from factorlm.layers.low_rank import LowRankConfig, LowRankLinear

__all__ = [
    "STRUCTURES",
    "DenseConfig",
    "DenseLinear",
    "Factor",
    "LowRankConfig",
    "LowRankLinear",
    "StructureConfig",
    "StructuredLinear",
    "register_structure",
    "structure_from_target",
]

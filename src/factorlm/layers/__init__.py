"""Structured linear layers behind one contract. Importing this package registers them all."""

from factorlm.layers.base import StructuredLinear
from factorlm.layers.block_dense import BlockDenseConfig, BlockDenseLinear
from factorlm.layers.block_shuffle import BlockShuffleConfig, BlockShuffleLinear
from factorlm.layers.config import (
    STRUCTURES,
    Factor,
    StructureConfig,
    register_structure,
    structure_from_target,
)
from factorlm.layers.dense import DenseConfig, DenseLinear
from factorlm.layers.low_rank import LowRankConfig, LowRankLinear
from factorlm.layers.packed import PackedLinear
from factorlm.layers.premerged import MergePolicy, PreMergedLinear
from factorlm.layers.self_guided import Guide, SelfGuidedLinear
from factorlm.layers.wrapper import StructuredWrapper, saved_name

__all__ = [
    "STRUCTURES",
    "BlockDenseConfig",
    "BlockDenseLinear",
    "BlockShuffleConfig",
    "BlockShuffleLinear",
    "DenseConfig",
    "DenseLinear",
    "Factor",
    "Guide",
    "LowRankConfig",
    "LowRankLinear",
    "MergePolicy",
    "PackedLinear",
    "PreMergedLinear",
    "SelfGuidedLinear",
    "StructureConfig",
    "StructuredLinear",
    "StructuredWrapper",
    "register_structure",
    "saved_name",
    "structure_from_target",
]

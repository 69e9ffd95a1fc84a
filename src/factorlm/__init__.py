"""factorlm: language models whose feed-forward layers are structured matrices.

Names load when they are first used; importing the package does not import torch. It also arranges
that ``transformers.AutoModelForCausalLM.from_pretrained`` opens structured models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports, when_imported

if TYPE_CHECKING:
    from factorlm.accounting import (
        config_for_param_ratio,
        count_params,
        flops_per_token,
        training_flops,
    )
    from factorlm.data import PrepareConfig, TokenDataset, TokenLoader, open_dataset, prepare
    from factorlm.eval import evaluate_loss
    from factorlm.hf import SelfGuidedTraining, build_causal_lm, load
    from factorlm.inference import pack_, premerge_, unpack_, unpremerge_
    from factorlm.layers import (
        BlockDenseConfig,
        BlockDenseLinear,
        BlockShuffleConfig,
        BlockShuffleLinear,
        DenseConfig,
        DenseLinear,
        Factor,
        LowRankConfig,
        LowRankLinear,
        MergePolicy,
        PackedLinear,
        PreMergedLinear,
        SelfGuidedLinear,
        StructureConfig,
        StructuredLinear,
    )
    from factorlm.optim import GuideSchedule
    from factorlm.records import RecordFile, RunRecord
    from factorlm.surgery import (
        StructureMap,
        SwapReport,
        attach_guides_,
        densify_,
        detach_guides_,
        factorize_,
    )
    from factorlm.train import TrainConfig, load_recipe
    from factorlm.train.callbacks import Callback
    from factorlm.train.trainer import Trainer

__version__ = "0.1.0"

_EXPORTS = {
    "BlockDenseConfig": "layers",
    "BlockDenseLinear": "layers",
    "BlockShuffleConfig": "layers",
    "BlockShuffleLinear": "layers",
    "Callback": "train.callbacks",
    "DenseConfig": "layers",
    "DenseLinear": "layers",
    "Factor": "layers",
    "GuideSchedule": "optim",
    "LowRankConfig": "layers",
    "LowRankLinear": "layers",
    "MergePolicy": "layers",
    "PackedLinear": "layers",
    "PreMergedLinear": "layers",
    "PrepareConfig": "data",
    "RecordFile": "records",
    "RunRecord": "records",
    "SelfGuidedLinear": "layers",
    "SelfGuidedTraining": "hf",
    "StructureConfig": "layers",
    "StructureMap": "surgery",
    "StructuredLinear": "layers",
    "SwapReport": "surgery",
    "TokenDataset": "data",
    "TokenLoader": "data",
    "TrainConfig": "train",
    "Trainer": "train.trainer",
    "attach_guides_": "surgery",
    "build_causal_lm": "hf",
    "config_for_param_ratio": "accounting",
    "count_params": "accounting",
    "densify_": "surgery",
    "detach_guides_": "surgery",
    "evaluate_loss": "eval",
    "factorize_": "surgery",
    "flops_per_token": "accounting",
    "load": "hf",
    "load_recipe": "train",
    "open_dataset": "data",
    "pack_": "inference",
    "premerge_": "inference",
    "prepare": "data",
    "training_flops": "accounting",
    "unpack_": "inference",
    "unpremerge_": "inference",
}

__all__ = [
    "BlockDenseConfig",
    "BlockDenseLinear",
    "BlockShuffleConfig",
    "BlockShuffleLinear",
    "Callback",
    "DenseConfig",
    "DenseLinear",
    "Factor",
    "GuideSchedule",
    "LowRankConfig",
    "LowRankLinear",
    "MergePolicy",
    "PackedLinear",
    "PreMergedLinear",
    "PrepareConfig",
    "RecordFile",
    "RunRecord",
    "SelfGuidedLinear",
    "SelfGuidedTraining",
    "StructureConfig",
    "StructureMap",
    "StructuredLinear",
    "SwapReport",
    "TokenDataset",
    "TokenLoader",
    "TrainConfig",
    "Trainer",
    "__version__",
    "attach_guides_",
    "build_causal_lm",
    "config_for_param_ratio",
    "count_params",
    "densify_",
    "detach_guides_",
    "evaluate_loss",
    "factorize_",
    "flops_per_token",
    "load",
    "load_recipe",
    "open_dataset",
    "pack_",
    "premerge_",
    "prepare",
    "training_flops",
    "unpack_",
    "unpremerge_",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)


def _register_with_transformers() -> None:
    from factorlm.hf.auto import register

    register()


when_imported("transformers.quantizers.auto", _register_with_transformers)

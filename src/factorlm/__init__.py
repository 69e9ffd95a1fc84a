"""factorlm: language models whose feed-forward layers are structured matrices.

Names load when they are first used; importing the package does not import torch. It also arranges
that ``transformers.AutoModelForCausalLM.from_pretrained`` opens structured models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports, when_imported

if TYPE_CHECKING:
    from factorlm.hf import build_causal_lm, load
    from factorlm.layers import (
        DenseConfig,
        DenseLinear,
        Factor,
        LowRankConfig,
        LowRankLinear,
        StructureConfig,
        StructuredLinear,
    )
    from factorlm.surgery import StructureMap, SwapReport, densify_, factorize_

__version__ = "0.1.0"

_EXPORTS = {
    "DenseConfig": "layers",
    "DenseLinear": "layers",
    "Factor": "layers",
    "LowRankConfig": "layers",
    "LowRankLinear": "layers",
    "StructureConfig": "layers",
    "StructureMap": "surgery",
    "StructuredLinear": "layers",
    "SwapReport": "surgery",
    "build_causal_lm": "hf",
    "densify_": "surgery",
    "factorize_": "surgery",
    "load": "hf",
}

__all__ = [
    "DenseConfig",
    "DenseLinear",
    "Factor",
    "LowRankConfig",
    "LowRankLinear",
    "StructureConfig",
    "StructureMap",
    "StructuredLinear",
    "SwapReport",
    "__version__",
    "build_causal_lm",
    "densify_",
    "factorize_",
    "load",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)


def _register_with_transformers() -> None:
    from factorlm.hf.auto import register

    register()


when_imported("transformers.quantizers.auto", _register_with_transformers)

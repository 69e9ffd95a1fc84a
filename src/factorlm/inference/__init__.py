"""Tokens and text from a model."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.inference.decoder import Decoder, TokenGeneration, generate_tokens
    from factorlm.inference.generate import Generation, generate_text, generate_texts
    from factorlm.inference.latency import LatencyTable, LayerCase, TokenLatency
    from factorlm.inference.packing import pack_, unpack_
    from factorlm.inference.premerge import (
        PremergeReport,
        PremergeRow,
        premerge_,
        premerged_layers,
        unpremerge_,
    )
    from factorlm.inference.sampling import Sampling
    from factorlm.inference.text import load_text_tokenizer
    from factorlm.inference.tuning import tune

_EXPORTS = {
    "Decoder": "decoder",
    "Generation": "generate",
    "LatencyTable": "latency",
    "LayerCase": "latency",
    "PremergeReport": "premerge",
    "PremergeRow": "premerge",
    "Sampling": "sampling",
    "TokenGeneration": "decoder",
    "TokenLatency": "latency",
    "generate_text": "generate",
    "generate_texts": "generate",
    "generate_tokens": "decoder",
    "load_text_tokenizer": "text",
    "pack_": "packing",
    "premerge_": "premerge",
    "premerged_layers": "premerge",
    "tune": "tuning",
    "unpack_": "packing",
    "unpremerge_": "premerge",
}

__all__ = [
    "Decoder",
    "Generation",
    "LatencyTable",
    "LayerCase",
    "PremergeReport",
    "PremergeRow",
    "Sampling",
    "TokenGeneration",
    "TokenLatency",
    "generate_text",
    "generate_texts",
    "generate_tokens",
    "load_text_tokenizer",
    "pack_",
    "premerge_",
    "premerged_layers",
    "tune",
    "unpack_",
    "unpremerge_",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

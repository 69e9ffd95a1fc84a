"""Tokens and text from a model."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.inference.decoder import Decoder, TokenGeneration, generate_tokens
    from factorlm.inference.generate import Generation, generate_text, generate_texts
    from factorlm.inference.sampling import Sampling
    from factorlm.inference.text import load_text_tokenizer

_EXPORTS = {
    "Decoder": "decoder",
    "Generation": "generate",
    "Sampling": "sampling",
    "TokenGeneration": "decoder",
    "generate_text": "generate",
    "generate_texts": "generate",
    "generate_tokens": "decoder",
    "load_text_tokenizer": "text",
}

__all__ = [
    "Decoder",
    "Generation",
    "Sampling",
    "TokenGeneration",
    "generate_text",
    "generate_texts",
    "generate_tokens",
    "load_text_tokenizer",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

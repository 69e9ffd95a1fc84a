"""Text from a model."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.inference.generate import Generation, Sampling, generate_text, load_text_tokenizer

__all__ = ["Generation", "Sampling", "generate_text", "load_text_tokenizer"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "generate"))

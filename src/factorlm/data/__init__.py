"""Text to token shards, and token shards to batches; torch is never imported."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.data.config import PrepareConfig
    from factorlm.data.dataset import TokenDataset, open_dataset
    from factorlm.data.loader import TokenLoader
    from factorlm.data.preparation import PrepareProgress, prepare
    from factorlm.data.tokenizer import TextTokenizer, load_tokenizer
    from factorlm.data.windows import EvalBatch, EvalWindows

__all__ = [
    "EvalBatch",
    "EvalWindows",
    "PrepareConfig",
    "PrepareProgress",
    "TextTokenizer",
    "TokenDataset",
    "TokenLoader",
    "load_tokenizer",
    "open_dataset",
    "prepare",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "EvalBatch": "windows",
        "EvalWindows": "windows",
        "PrepareConfig": "config",
        "PrepareProgress": "preparation",
        "TextTokenizer": "tokenizer",
        "TokenDataset": "dataset",
        "TokenLoader": "loader",
        "load_tokenizer": "tokenizer",
        "open_dataset": "dataset",
        "prepare": "preparation",
    },
)

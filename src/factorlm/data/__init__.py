"""Text to token shards, and token shards to batches; torch is never imported."""

from factorlm.lazy import lazy_exports

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

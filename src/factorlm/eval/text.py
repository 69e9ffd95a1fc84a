"""A model's loss on prepared shards, or on any text that ``factorlm prepare`` reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from factorlm.config import check
from factorlm.data import EvalWindows, PrepareConfig, TokenDataset, prepare
from factorlm.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from factorlm.eval.loss import EvalResult, evaluate_loss
from factorlm.hf.loss import CausalLMLoss


def evaluate_model(
    model: PreTrainedModel,
    dataset: TokenDataset,
    split: str = "validation",
    *,
    context_length: int,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Loss over every non-overlapping window of ``split``, the last partial one included.

    ``model`` is in eval mode; ``on_progress`` is told the tokens that are done, and of how many.
    Raises ``DataError`` if there is nothing to predict.
    """
    windows = EvalWindows(dataset, split, context_length=context_length, batch_size=batch_size)
    return evaluate_loss(
        CausalLMLoss(model),
        windows,
        device=model.device,
        bytes_per_token=windows.num_text_bytes / windows.num_targets,
        on_progress=lambda done: on_progress(done, windows.num_targets),
    )


@contextmanager
def prepared_text(
    sources: Sequence[str], tokenizer_folder: Path, *, text_column: str = "text"
) -> Iterator[TokenDataset]:
    """What ``factorlm prepare`` makes of ``sources``, in split ``train``; gone after the block."""
    with tempfile.TemporaryDirectory(prefix="factorlm-eval-") as folder:
        config = PrepareConfig(
            sources=tuple(sources),
            output=str(Path(folder) / "tokens"),
            tokenizer=str(tokenizer_folder),
            val_fraction=0.0,
            text_column=text_column,
        )
        yield prepare(config)


def check_tokenizer(model: PreTrainedModel, folder: Path, dataset: TokenDataset) -> None:
    """Raise ``ConfigError`` if the ids of ``dataset`` are not those of ``model``, whose folder may
    hold a tokenizer."""
    rows, size = model.get_input_embeddings().weight.shape[0], dataset.vocab_size
    check(size <= rows, f"{dataset.path} has a vocabulary of {size}, the model has one of {rows}")
    if (folder / TOKENIZER_FILE).is_file():
        same = load_tokenizer(folder).fingerprint == dataset.tokenizer_fingerprint
        check(same, f"{dataset.path} was prepared with another tokenizer than that of {folder}")

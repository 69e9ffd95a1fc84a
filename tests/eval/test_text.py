from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from factorlm.data import PrepareConfig, TokenDataset, load_tokenizer, prepare
from factorlm.data.tokenizer import byte_tokenizer
from factorlm.errors import ConfigError
from factorlm.eval import check_tokenizer, evaluate_model, prepared_text
from factorlm.testing.models import tiny_model

TEXT = "Round the rugged rocks the ragged rascal ran. Größe!\n" * 4


def prepare_bytes(folder: Path, tokenizer: str = "bytes") -> TokenDataset:
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return prepare(
        PrepareConfig(
            sources=(str(folder / "text.txt"),),
            output=str(folder / "tokens"),
            tokenizer=tokenizer,
            val_fraction=0.5,
            workers=1,
        )
    )


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return prepare_bytes(tmp_path / "data")


def test_every_window_counts_the_last_partial_one_too(dataset: TokenDataset) -> None:
    model = tiny_model("llama", vocab_size=257).double()
    ids = [*TEXT.encode()[len(TEXT.encode()) // 2 :], 256]
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor(ids[start : start + 17])
        logits = model(input_ids=window[None, :-1]).logits[0]
        nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    told: list[tuple[int, int]] = []
    result = evaluate_model(
        model,
        dataset,
        context_length=16,
        batch_size=3,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert (len(ids) - 1) % 16 != 0
    assert result.num_tokens == len(ids) - 1
    assert result.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-9)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (len(ids) - 1), rel=1e-9)
    assert told[-1] == (len(ids) - 1, len(ids) - 1)


def test_raw_text_is_read_as_prepare_reads_it(dataset: TokenDataset, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "two.jsonl").write_text('{"body": "ab"}\n{"body": "c"}\n')
    sources = [str(tmp_path / "one.txt"), str(tmp_path / "two.jsonl")]
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    with prepared_text(sources, dataset.tokenizer_folder, text_column="body") as text:
        folder = text.path
        first, second = text.split("train").streams
        read = first.read(0, first.num_tokens).tolist(), second.read(0, second.num_tokens).tolist()
        num_bytes = text.split("train").num_text_bytes
    assert read[0] == [*tokenizer.encode(TEXT), 256]
    assert read[1] == [*b"ab", 256, *b"c", 256]
    assert num_bytes == len(TEXT.encode()) + 3
    assert not folder.exists()


def test_text_of_another_tokenizer_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300)
    check_tokenizer(model, dataset.tokenizer_folder, dataset)
    check_tokenizer(model, tmp_path, dataset)
    other = prepare_bytes(tmp_path / "other", "bpe:270")
    with pytest.raises(ConfigError, match="prepared with another tokenizer"):
        check_tokenizer(model, dataset.tokenizer_folder, other)
    with pytest.raises(ConfigError, match="vocabulary of 257, the model has one of 99"):
        check_tokenizer(tiny_model("llama"), tmp_path, dataset)


def test_bytes_are_the_ids() -> None:
    assert byte_tokenizer().encode("aß") == [*"aß".encode()]

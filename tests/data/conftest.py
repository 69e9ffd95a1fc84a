"""Small texts and tokenizers of every kind that the data code meets."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORD_LINE = (
    "the of and to in a is that it was for on are as with his they at be this from I have or by "
    "one had not but what all were when we there can an your which their said if do will each "
    "naïve coöperate 東京 日本語 привет мир γειά 12345 67 8 3.14159 don't we'll it's x_y ((( --- "
    "ﬁne ½ é 🎉 👩‍👩‍👧 \u200b <|endoftext|> </s> [SEP]"
)
WORDS = WORD_LINE.split(" ")
GAPS = (" ",) * 12 + ("\n", "\n\n", "  ", "   \n", "\t", "\r\n", ", ", ". ", "")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def make_text():
    """Words of many scripts with all kinds of gaps, and now and then a long run of digits."""
    return _make_text


def _make_text(num_words, seed=0):
    generator = random.Random(seed)
    parts = []
    for _ in range(num_words):
        word = generator.choice(WORDS)
        if generator.random() < 0.01:
            word = "".join(generator.choice("0123456789") for _ in range(500))
        parts += [word, generator.choice(GAPS)]
    return "".join(parts)


def _bpe(pre_tokenizer, normalizer=None, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["</s>"],
        initial_alphabet=alphabet if not options else [],
        show_progress=False,
    )


def _byte_level():
    return _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _prefix_space():
    return _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))


def _digits_in_threes():
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _bpe(pre_tokenizers.Sequence([split, byte_level]))


def _metaspace(scheme):
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return _bpe(pre_tokenizer, normalizers.NFKC(), unk_token="</s>")


def _word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "</s>"]
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=special, show_progress=False
    )


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )


KINDS = {
    "byte-level": _byte_level,
    "prefix-space": _prefix_space,
    "digits-in-threes": _digits_in_threes,
    "metaspace-always": lambda: _metaspace("always"),
    "metaspace-first": lambda: _metaspace("first"),
    "word-piece": _word_piece,
    "unigram": _unigram,
}


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """A folder for each kind of tokenizer, and one whose text has no place to be cut at."""
    root, text = tmp_path_factory.mktemp("tokenizers"), _make_text(4000, seed=1)
    folders = {}
    for name, make in KINDS.items():
        tokenizer, trainer = make()
        tokenizer.train_from_iterator([text], trainer=trainer)
        folders[name] = _save(tokenizer, root / name)
    tokenizer, trainer = _bpe(pre_tokenizers.Split(" ", "merged_with_next"), unk_token="</s>")
    tokenizer.train_from_iterator([text], trainer=trainer)
    folders["without-words"] = _save(tokenizer, root / "without-words", pre_tokenizer=None)
    return folders


def _save(tokenizer, folder, **changes):
    folder.mkdir()
    values = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    return folder


@pytest.fixture
def prepared(tmp_path):
    """Prepare texts given by source name; returns the opened dataset."""
    from factorlm.data import PrepareConfig, prepare

    def build(texts, **options):
        sources = []
        for name, text in texts.items():
            path = tmp_path / f"{name}.txt"
            path.write_text(text, encoding="utf-8")
            sources.append(str(path))
        options = {"tokenizer": "bytes", "workers": 1, "val_fraction": 0.0} | options
        return prepare(
            PrepareConfig(sources=tuple(sources), output=str(tmp_path / "data"), **options)
        )

    return build


@pytest.fixture(scope="session")
def all_ids():
    """Every id of a split, source after source."""

    def read(split):
        streams = split.streams
        return np.concatenate([stream.read(0, stream.num_tokens) for stream in streams])

    return read

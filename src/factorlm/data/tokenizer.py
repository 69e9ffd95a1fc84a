"""Tokenizers as folders that Hugging Face opens too, read here without transformers or torch.

A tokenizer folder holds ``tokenizer.json`` and ``tokenizer_config.json``. Text is always encoded as
ordinary text: a special token's name inside it stays text, so only ``eos_id`` ends a document.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from factorlm.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
EOS_TOKEN = "<|endoftext|>"
"""Of the tokenizers that are made here."""
MAX_CUT_TRIALS = 16


class TextTokenizer:
    """Text to ids and back, with the end-of-document id and places where text may be cut."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str) -> None:
        """Wrap ``backend``; raises ``DataError`` if it does not know ``eos_token``."""
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(f"the tokenizer has no token {eos_token!r} to end documents with")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """One more than the largest id: what an embedding must hold."""
        self.cuts_text = backend.pre_tokenizer is not None
        """Whether text has places to cut at, so that a long document can go in pieces."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides which ids a text gets, equal after a save by transformers."""
        whole = json.loads(self.backend.to_str())
        parts = {key: whole[key] for key in ("normalizer", "pre_tokenizer", "model")}
        parts |= {"added_tokens": whole["added_tokens"], "eos_id": self.eos_id}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added at its ends."""
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_array(self, text: str) -> np.ndarray:
        """``encode`` as a uint32 array of shape (tokens,)."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special tokens are left out."""
        return self.backend.decode([int(token) for token in ids])

    def find_cut(self, window: str) -> int | None:
        """A character position where ``window``, and any text around it, may be cut; or None.

        The two parts, each encoded alone, give the ids of the whole. A place counts if it lies in
        the middle half, between two of the pre-tokenizer's words, and stays so when the window
        begins one character later: a rule that counts characters (digits in threes) does not know
        where the text in front of the window began.
        """
        if not self.cuts_text:
            return None
        views = [(window, 0), (window[1:], 1)]
        encodings = [self._encode_words(text) for text, _ in views]
        middle, reach = len(window) // 2, len(window) // 4
        ends = [cut for cut in _word_ends(encodings[0]) if abs(cut - middle) < reach]
        for cut in sorted(ends, key=lambda cut: abs(cut - middle))[:MAX_CUT_TRIALS]:
            if all(
                self.encode(text[: cut - shift]) + self.encode(text[cut - shift :]) == encoding.ids
                for (text, shift), encoding in zip(views, encodings, strict=True)
            ):
                return cut
        return None

    def _encode_words(self, text: str) -> Any:
        return self.backend.encode(text, add_special_tokens=False)


class ByteTokenizer(TextTokenizer):
    """One id a UTF-8 byte, which needs no library: 256 ids and the end of a document."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token != self.eos_id).decode("utf-8", "replace")

    def find_cut(self, window: str) -> int | None:
        return len(window) // 2


def byte_tokenizer() -> ByteTokenizer:
    """Id = byte, and 256 for the end of a document, as a BPE without merges."""
    symbols = byte_symbols()
    vocab = {symbol: byte for byte, symbol in enumerate(symbols)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS_TOKEN, special=True, normalized=False)])
    return ByteTokenizer(backend, EOS_TOKEN)


def byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers show for each byte (GPT-2's table)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    shown |= set(range(ord("®"), ord("ÿ") + 1))
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """Open a tokenizer folder that names its ``eos_token``.

    Raises ``DataError`` naming the file if it is missing, damaged, or has no end-of-text token.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    backend = read_backend(path)
    eos_token = read_eos_token(folder)
    if eos_token is None:
        raise DataError(f"{folder / CONFIG_FILE}: no eos_token, which must end each document")
    tokenizer = TextTokenizer(backend, eos_token)
    return ByteTokenizer(backend, eos_token) if _is_bytes(tokenizer) else tokenizer


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a ``tokenizer.json``; raises ``DataError`` naming it."""
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer: {error}") from None


def read_eos_token(folder: Path) -> str | None:
    """The ``eos_token`` of a folder's ``tokenizer_config.json``, if both are there."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer config: {error}") from None
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise DataError(f"{path}: eos_token={token!r} is not a string")
    return token


def _is_bytes(tokenizer: TextTokenizer) -> bool:
    return tokenizer.vocab_size == 257 and tokenizer.fingerprint == byte_tokenizer().fingerprint


def _word_ends(encoding: Any) -> list[int]:
    """Character positions after the last token of each word but the last."""
    words: Sequence[int | None] = encoding.word_ids
    pairs = zip(words, words[1:], encoding.offsets, strict=False)
    return [offset[1] for word, following, offset in pairs if word != following]

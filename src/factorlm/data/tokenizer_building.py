"""Make a tokenizer: bytes, a byte-level BPE trained on text, or an existing Hugging Face one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from factorlm.config import check
from factorlm.data.tokenizer import (
    CONFIG_FILE,
    EOS_TOKEN,
    TOKENIZER_FILE,
    TextTokenizer,
    byte_symbols,
    byte_tokenizer,
    read_backend,
    read_eos_token,
)
from factorlm.errors import ConfigError

BYTES = "bytes"
BPE_PREFIX = "bpe:"
MIN_BPE_SIZE = 257
"""All bytes and the end-of-document token."""
SIDE_FILES = ("special_tokens_map.json", "chat_template.jinja")


def bpe_size(spec: str) -> int | None:
    """The size in ``bpe:<size>``; None if ``spec`` is something else."""
    if not spec.startswith(BPE_PREFIX):
        return None
    digits = spec.removeprefix(BPE_PREFIX)
    size = int(digits) if digits.isascii() and digits.isdigit() else 0
    rule = f"bpe:<size> needs a size of at least {MIN_BPE_SIZE}: the bytes and {EOS_TOKEN}"
    check(size >= MIN_BPE_SIZE, f"tokenizer={spec!r}: {rule}")
    return size


def build_tokenizer(
    spec: str, folder: Path, sample: Iterable[str], *, eos_token: str | None = None
) -> None:
    """Write the tokenizer that ``spec`` names into the empty ``folder``.

    ``sample`` is read only to train a BPE. ``eos_token`` overrides the one that an existing
    tokenizer names. Raises ``ConfigError`` if nothing of that name can be loaded.
    """
    size = bpe_size(spec)
    if size is not None:
        _save(train_bpe(sample, size), folder)
    elif spec == BYTES:
        _save(byte_tokenizer(), folder)
    else:
        _copy_existing(spec, folder, eos_token)


def train_bpe(sample: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE (Radford et al. 2019) of at most ``vocab_size`` ids on ``sample``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(EOS_TOKEN, special=True, normalized=False)],
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer=trainer)
    return TextTokenizer(backend, EOS_TOKEN)


def _save(tokenizer: TextTokenizer, folder: Path) -> None:
    tokenizer.backend.save(str(folder / TOKENIZER_FILE))
    _write_config(folder, tokenizer.eos_token)


def _write_config(folder: Path, eos_token: str) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _copy_existing(spec: str, folder: Path, eos_token: str | None) -> None:
    source = Path(spec)
    if source.name == TOKENIZER_FILE and source.is_file():
        source = source.parent
    if (source / TOKENIZER_FILE).is_file():
        for name in (TOKENIZER_FILE, CONFIG_FILE, *SIDE_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    else:
        _save_with_transformers(spec, folder)
    _settle_eos(spec, folder, eos_token)


def _save_with_transformers(spec: str, folder: Path) -> None:
    """Let transformers find a tokenizer by name, or convert a folder of an older form."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(spec).save_pretrained(folder)
    except Exception as error:  # transformers and the hub raise many kinds
        raise ConfigError(
            f"tokenizer={spec!r} is not 'bytes', 'bpe:<size>', a folder with {TOKENIZER_FILE}, or "
            f"a Hugging Face tokenizer that can be loaded: {error}"
        ) from None
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(f"tokenizer={spec!r} has no fast form ({TOKENIZER_FILE})")


def _settle_eos(spec: str, folder: Path, eos_token: str | None) -> None:
    """Make the folder's config name an end-of-document token that the tokenizer has."""
    token = eos_token or read_eos_token(folder)
    if token is None:
        raise ConfigError(f"tokenizer={spec!r} names no eos_token: give one with eos_token")
    known = read_backend(folder / TOKENIZER_FILE).token_to_id(token) is not None
    check(known, f"eos_token={token!r} is not in the vocabulary of tokenizer={spec!r}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        _write_config(folder, token)
    elif token != read_eos_token(folder):
        config = json.loads(path.read_text(encoding="utf-8")) | {"eos_token": token}
        path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

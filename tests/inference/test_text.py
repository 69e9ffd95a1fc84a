from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from factorlm.data.tokenizer_building import build_tokenizer
from factorlm.errors import CheckpointError, ConfigError
from factorlm.inference import load_text_tokenizer
from factorlm.inference.text import TextStream

TEXT = "def füñ(): return '€ 😀'\n\n\nEND of it. " * 3


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(request.param, folder, [TEXT])
    return load_text_tokenizer(folder)


def stream_of(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[TextStream, list[str], int]:
    """The stream after ``ids``, its pieces, and how many tokens it took."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, stop, pieces.append)
    num_taken = next((n for n, token in enumerate(ids, 1) if stream.add(token)), len(ids))
    stream.finish()
    return stream, pieces, num_taken


def test_pieces_are_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stream, pieces, _ = stream_of(tokenizer, tokenizer(TEXT)["input_ids"])
    assert stream.text == "".join(pieces) == TEXT
    assert not stream.stopped
    assert len(pieces) > 20
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_characters_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a€b😀")["input_ids"]
    for cut in (ids[1:-1], [*ids[:2], *ids], [*ids, *ids[-2:-1]], ids[-2:] * 4):
        stream, pieces, _ = stream_of(tokenizer, cut)
        assert stream.text == "".join(pieces) == tokenizer.decode(cut, skip_special_tokens=True)


def test_end_of_text_token_is_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stream, _, _ = stream_of(tokenizer, [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id])
    assert stream.text == "ab"


@pytest.mark.parametrize("stop", ["END", "\n\n\n", "€ 😀'", "d", ": return", "D of it. def"])
def test_stop_string_ends_the_text(tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    """It spans tokens, begins in the middle of one, and no piece ever held a part of it."""
    ids = tokenizer(TEXT)["input_ids"]
    stream, pieces, num_taken = stream_of(tokenizer, ids, (stop, "never seen"))
    assert stream.stopped
    assert stream.text == "".join(pieces) == TEXT[: TEXT.index(stop)]
    decoded = [tokenizer.decode(ids[:count]) for count in (num_taken - 1, num_taken)]
    assert [stop in text for text in decoded] == [False, True]


def test_first_of_several_stop_strings_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    for stops in (("END", "return"), ("return", "END")):
        assert stream_of(tokenizer, ids, stops)[0].text == TEXT[: TEXT.index("return")]


def test_beginning_of_a_stop_string_waits_and_comes_later(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "xx ENxEND"
    seen: list[str] = []
    stream = TextStream(tokenizer, ("ENDS",), seen.append)
    after = []
    for token in tokenizer(text)["input_ids"]:
        stream.add(token)
        after.append("".join(seen))
    assert all(later.startswith(earlier) for earlier, later in pairwise(after))
    assert after[-1] == "xx ENx"
    stream.finish()
    assert "".join(seen) == stream.text == text


def test_empty_stop_string_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"stop=\['a', ''\] must have no empty string"):
        TextStream(tokenizer, ("a", ""))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="no tokenizer that can be opened"):
        load_text_tokenizer(tmp_path)


SPACED = [
    "<unk>",
    "<s>",
    "▁Hello",
    "▁world",
    "▁",
    "ly",
    *(f"<0x{byte:02X}>" for byte in range(256)),
]
STRIPPING = {
    "llama": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "metaspace": decoders.Metaspace(),
}
"""Decoders that take the space before the first token for none of the text's own: those of Llama 2,
Mistral and TinyLlama, and of T5."""


@pytest.fixture(params=sorted(STRIPPING))
def stripping(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    ids = {word: place for place, word in enumerate(SPACED)}
    built = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    built.decoder = STRIPPING[request.param]
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", unk_token="<unk>")


def ids_of(words: str) -> list[int]:
    return [SPACED.index(word) for word in words.split()]


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        ("<s> ▁Hello", "▁world ▁world", " world world"),
        ("▁Hello " * 40, "▁world ▁ ▁world", " world  world"),
        ("▁Hello", "▁ ▁world", "  world"),
        ("▁Hello", "ly ▁world", "ly world"),
        ("▁Hello", "▁world <s>", " world"),
        ("▁Hello <s> <s> <s>", "▁world", " world"),
        ("<s>", "▁world ▁world", "world world"),
        ("", "▁world ▁world", "world world"),
    ],
)
def test_text_keeps_the_space_after_its_prompt(
    stripping: PreTrainedTokenizerBase, prompt: str, new: str, text: str
) -> None:
    before, ids = ids_of(prompt), ids_of(new)
    pieces: list[str] = []
    stream = TextStream(stripping, (), pieces.append, before)
    for token in ids:
        stream.add(token)
    stream.finish()
    whole, known = (
        stripping.decode(one, skip_special_tokens=True) for one in ([*before, *ids], before)
    )
    assert stream.text == "".join(pieces) == text == whole.removeprefix(known)


def test_bytes_after_a_prompt_wait_for_the_whole_character() -> None:
    built = Tokenizer(models.WordLevel({word: place for place, word in enumerate(SPACED)}))
    built.decoder = STRIPPING["llama"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    pieces: list[str] = []
    stream = TextStream(tokenizer, (), pieces.append, ids_of("▁Hello <0xC3> <0xBC>"))
    for token in ids_of("▁ <0xE2> <0x82> <0xAC> ▁world"):
        stream.add(token)
    assert pieces == [" ", "€", " world"]


def test_stop_string_that_begins_with_a_space(stripping: PreTrainedTokenizerBase) -> None:
    stream = TextStream(stripping, (" world",), None, ids_of("▁Hello"))
    assert stream.add(SPACED.index("▁world"))
    assert stream.text == ""

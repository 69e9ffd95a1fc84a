"""Tokenizers: exact bytes, the same ids as Hugging Face, and what makes two of them differ."""

from __future__ import annotations

import json

import numpy as np
import pytest

from factorlm.data.tokenizer import byte_tokenizer, load_tokenizer
from factorlm.data.tokenizer_building import bpe_size, build_tokenizer, train_bpe
from factorlm.errors import ConfigError, DataError

TEXT = "Héllo <|endoftext|>\x00\r\n\tünï 漢字 🎉 don't 12345   x"


def every_character():
    """All of Unicode but surrogates: all byte values that valid UTF-8 has."""
    return "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))


@pytest.fixture
def bytes_folder(tmp_path):
    folder = tmp_path / "bytes"
    folder.mkdir()
    build_tokenizer("bytes", folder, ())
    return folder


@pytest.fixture
def bpe_folder(tmp_path):
    folder = tmp_path / "bpe"
    folder.mkdir()
    build_tokenizer("bpe:300", folder, [TEXT * 50])
    return folder


def test_byte_ids_are_the_bytes(bytes_folder):
    tokenizer = load_tokenizer(bytes_folder)
    text = every_character()
    data = text.encode("utf-8")
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint32
    assert ids.astype(np.uint8).tobytes() == data
    assert set(data) == {*range(0xC0), *range(0xC2, 0xF5)}
    assert tokenizer.encode(TEXT) == list(TEXT.encode("utf-8"))
    assert tokenizer.decode([*ids.tolist(), 256]) == text
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (256, 257)


def test_the_byte_tokenizer_as_a_library_tokenizer_gives_the_bytes_too(bytes_folder):
    """What transformers computes from the saved folder, character by character of Unicode."""
    backend = byte_tokenizer().backend
    text = every_character()[:0x3000] + "🎉𝔘\U0010ffff"
    assert backend.encode(text).ids == list(text.encode("utf-8"))
    assert backend.decode(backend.encode(text).ids) == text


@pytest.mark.parametrize("kind", ["bytes_folder", "bpe_folder"])
def test_transformers_opens_the_folder_and_agrees(kind, request, tmp_path):
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(kind)
    ours = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text == ours.decode(ours.encode(text))
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_id, ours.vocab_size)
    theirs.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint


def test_the_end_of_text_token_inside_a_text_stays_text(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<|endoftext|>b"


def test_a_trained_bpe_has_the_size_and_shortens(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode_array(TEXT).tolist() == tokenizer.encode(TEXT)
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(every_character()[:5000])) == every_character()[:5000]


def test_training_gives_the_same_tokenizer_again():
    first, second = (train_bpe([TEXT, "and again " * 9], 280) for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()


def test_fingerprints_tell_tokenizers_apart(bytes_folder, bpe_folder, tokenizer_folders):
    folders = [bytes_folder, bpe_folder, *tokenizer_folders.values()]
    assert len({load_tokenizer(folder).fingerprint for folder in folders}) == len(folders)
    values = json.loads((bpe_folder / "tokenizer.json").read_text())
    before = load_tokenizer(bpe_folder).fingerprint
    vocab = values["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (bpe_folder / "tokenizer.json").write_text(json.dumps(values))
    assert load_tokenizer(bpe_folder).fingerprint != before


def test_truncation_and_padding_of_a_saved_tokenizer_are_off(bpe_folder):
    before = load_tokenizer(bpe_folder)
    backend = load_tokenizer(bpe_folder).backend
    backend.enable_truncation(4)
    backend.enable_padding(length=10_000)
    backend.save(str(bpe_folder / "tokenizer.json"))
    after = load_tokenizer(bpe_folder)
    assert after.encode(TEXT) == before.encode(TEXT)
    assert after.fingerprint == before.fingerprint


def test_a_byte_tokenizer_with_other_ids_is_not_taken_for_ours(bytes_folder):
    path = bytes_folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(values))
    assert load_tokenizer(bytes_folder).encode("AB") == [66, 65]


def test_existing_tokenizers_are_copied(tokenizer_folders, tmp_path):
    source = tokenizer_folders["byte-level"]
    for spec in (source, source / "tokenizer.json"):
        target = tmp_path / spec.name
        target.mkdir()
        build_tokenizer(str(spec), target, ())
        assert load_tokenizer(target).fingerprint == load_tokenizer(source).fingerprint


def test_another_end_token_can_be_named(tokenizer_folders, tmp_path):
    build_tokenizer(str(tokenizer_folders["word-piece"]), tmp_path, (), eos_token="[UNK]")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("[UNK]", 0)


def test_a_tokenizer_without_a_config_needs_a_named_end(tokenizer_folders, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    name = "tokenizer.json"
    (source / name).write_bytes((tokenizer_folders["byte-level"] / name).read_bytes())
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ConfigError, match="names no eos_token"):
        build_tokenizer(str(source), target, ())
    with pytest.raises(ConfigError, match=r"eos_token='<x>' is not in the vocabulary"):
        build_tokenizer(str(source), target, (), eos_token="<x>")
    build_tokenizer(str(source), target, (), eos_token="</s>")
    assert load_tokenizer(target).eos_token == "</s>"


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-1", "bpe:4k", "bpe:²", "bpe: 300"])
def test_wrong_sizes_are_refused(spec):
    with pytest.raises(ConfigError, match="at least 257"):
        bpe_size(spec)


def test_sizes_are_read():
    assert [bpe_size(spec) for spec in ("bpe:257", "bytes", "gpt2")] == [257, None, None]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty' is not 'bytes', 'bpe:<size>', a folder with"):
        build_tokenizer(str(tmp_path / "empty"), tmp_path, ())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json: not a tokenizer config"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: not a tokenizer config"),
        ("tokenizer_config.json", "{}", "no eos_token"),
        ("tokenizer_config.json", None, "no eos_token"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token=3 is not a string"),
        ("tokenizer_config.json", '{"eos_token": "<x>"}', "no token '<x>'"),
    ],
)
def test_damaged_folders_are_named(bpe_folder, name, content, message):
    (bpe_folder / name).unlink()
    if content is not None:
        (bpe_folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(bpe_folder)

"""Long documents in pieces: the ids are those of the whole, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorlm.data import documents
from factorlm.data.documents import FileDocument, TextDocument, cut_document, next_character
from factorlm.data.tokenizer import byte_tokenizer, load_tokenizer
from factorlm.errors import DataError

KINDS = (
    "byte-level",
    "prefix-space",
    "digits-in-threes",
    "metaspace-always",
    "metaspace-first",
    "word-piece",
    "unigram",
)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 2000)
    monkeypatch.setattr(documents, "WINDOW_BYTES", 300)


def as_document(text):
    return TextDocument("test", 0, text.encode("utf-8"))


def encode_in_pieces(document, tokenizer):
    pieces = list(cut_document(document, 0, document.num_bytes, tokenizer))
    assert [piece[1] for piece in pieces[:-1]] == [piece[0] for piece in pieces[1:]]
    texts = [document.read(start, stop).decode("utf-8") for start, stop in pieces]
    return [token for text in texts for token in tokenizer.encode(text)], len(pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [2, 3])
def test_pieces_give_the_ids_of_the_whole(kind, seed, make_text, tokenizer_folders, small_pieces):
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    text = make_text(8000, seed)
    ids, num_pieces = encode_in_pieces(as_document(text), tokenizer)
    assert num_pieces > 15
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["byte-level", "digits-in-threes", "word-piece"])
@pytest.mark.parametrize(
    "text",
    ["0123456789" * 600 + " end", "0" * 6001 + " x", " " * 6000 + "x", "\n" * 6000, "a" * 6000,
     "ab " * 2500, "\r\n" * 3000, "'s" * 3000, "e\u0301" * 3000, "🎉" * 2000, "--- " * 2000],
    ids=lambda text: repr(text[:4]),
)  # fmt: skip
def test_texts_of_one_pattern(kind, text, tokenizer_folders, small_pieces):
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    ids, _ = encode_in_pieces(as_document(text), tokenizer)
    assert ids == tokenizer.encode(text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(st.text(max_size=30), st.sampled_from(["  ", "\n\n", "000", "don't", "ﬁ", "１"])),
        max_size=60,
    )
)
def test_any_text(tokenizer_folders, parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 100)
        patch.setattr(documents, "WINDOW_BYTES", 60)
        text = "".join(parts)
        for kind in ("byte-level", "digits-in-threes", "metaspace-first"):
            tokenizer = load_tokenizer(tokenizer_folders[kind])
            ids, _ = encode_in_pieces(as_document(text), tokenizer)
            assert ids == tokenizer.encode(text)


def test_bytes_are_cut_between_characters(small_pieces):
    text = "é🎉漢" * 3000
    ids, num_pieces = encode_in_pieces(as_document(text), byte_tokenizer())
    assert num_pieces > 10
    assert bytes(ids) == text.encode("utf-8")


def test_a_tokenizer_without_words_takes_whole_documents_up_to_a_size(
    make_text, tokenizer_folders, small_pieces, monkeypatch
):
    tokenizer = load_tokenizer(tokenizer_folders["without-words"])
    assert not tokenizer.cuts_text
    document = as_document(make_text(2000))
    assert encode_in_pieces(document, tokenizer)[1] == 1
    monkeypatch.setattr(documents, "MAX_WHOLE_BYTES", document.num_bytes - 1)
    rule = (
        rf"test: {document.num_bytes:,} bytes of text without .* at most {document.num_bytes - 1:,}"
    )
    with pytest.raises(DataError, match=rule):
        encode_in_pieces(document, tokenizer)


def test_a_word_that_is_too_long_is_refused(tokenizer_folders, small_pieces, monkeypatch):
    monkeypatch.setattr(documents, "MAX_WHOLE_BYTES", 10_000)
    tokenizer = load_tokenizer(tokenizer_folders["byte-level"])
    with pytest.raises(DataError, match="without a place where the tokenizer cuts"):
        encode_in_pieces(as_document("start " + "a" * 20_000 + " end"), tokenizer)


def test_pieces_go_on_from_any_cut(make_text, tokenizer_folders, small_pieces):
    tokenizer = load_tokenizer(tokenizer_folders["byte-level"])
    document = as_document(make_text(4000))
    pieces = list(cut_document(document, 0, document.num_bytes, tokenizer))
    for index in (1, len(pieces) // 2, len(pieces) - 1):
        start = pieces[index][0]
        rest = list(cut_document(document, start, document.num_bytes, tokenizer))
        assert rest == pieces[index:]
    assert not list(cut_document(document, document.num_bytes, document.num_bytes, tokenizer))


def test_a_file_is_a_document_like_its_text(tmp_path, make_text, tokenizer_folders, small_pieces):
    text, path = make_text(3000), tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    document = FileDocument(str(path), 0, path, 3, path.stat().st_size - 3)
    tokenizer = load_tokenizer(tokenizer_folders["byte-level"])
    assert encode_in_pieces(document, tokenizer)[0] == tokenizer.encode(text)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)
    document = FileDocument(str(path), 0, path, 0, 100)
    path.write_bytes(b"x" * 60)
    with pytest.raises(DataError, match=r"a\.txt: changed while it was read"):
        document.read(50, 70)


def test_next_character():
    document = as_document("aé漢🎉")
    assert [next_character(document, at) for at in range(11)] == [
        0,
        1,
        3,
        3,
        6,
        6,
        6,
        10,
        10,
        10,
        10,
    ]

"""Sources: what a name stands for, in which order, and what is refused."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest

from factorlm.data.documents import Document
from factorlm.data.sources import open_source
from factorlm.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.txt",
        "a/z.md",
        "a/b.jsonl",
        "c.PARQUET",
        "skip.csv",
        ".hidden.txt",
        ".x/y.txt",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text of " + name)
    return tmp_path / "data"


def names(spec):
    return [part.name for part in open_source(str(spec)).parts]


def texts(spec, column="text"):
    records = (record for part in open_source(str(spec)).parts for record in part.read(column, 0))
    return [record.read(0, record.num_bytes).decode("utf-8") for record in records]


def test_a_folder_is_its_files_by_name(folder):
    assert names(folder) == ["a/b.jsonl", "a/z.md", "b.txt", "c.PARQUET"]
    assert names(folder / "b.txt") == ["b.txt"]
    source = open_source(str(folder))
    assert source.size == sum(len("text of " + name) for name in names(folder))
    assert [part.is_document for part in source.parts] == [False, True, True, False]


def test_a_pattern_is_its_files_by_name(folder):
    assert names(folder / "**" / "*.txt") == [f"{folder}/b.txt"]
    assert names(folder / "a" / "*.*") == [f"{folder}/a/b.jsonl", f"{folder}/a/z.md"]


def test_a_name_with_pattern_characters_that_exists_is_that_file(folder):
    (folder / "d[1].txt").write_text("x")
    assert names(folder / "d[1].txt") == ["d[1].txt"]


def test_the_standard_library(monkeypatch):
    source = open_source("python-stdlib")
    found = [part.name for part in source.parts]
    assert found == sorted(found)
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} <= set(found)
    assert not [name for name in found if "site-packages" in name or "/test" in name]
    part = source.parts[found.index("abc.py")]
    (document,) = part.read("text", 0)
    expected = (Path(sysconfig.get_path("stdlib")) / "abc.py").read_bytes()
    assert document.read(0, document.num_bytes) == expected
    assert isinstance(document, Document)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.tx", r"no such file, folder, pattern or dataset\. Did you mean 'b.txt'"),
        ("skip.csv", r"skip\.csv: no reader for this kind of file; known: \.txt, \.md"),
        ("*.none", "pattern .*holds no file of a known kind"),
        ("empty", "folder .*holds no file of a known kind"),
        ("pipe.txt", r"pipe\.txt is not a plain file"),
    ],
)
def test_what_cannot_be_a_source_is_refused(folder, name, message):
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(DataError, match=message):
        open_source(str(folder / name))


def test_a_pipe_in_a_folder_is_refused(folder):
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is not a plain file"):
        open_source(str(folder))


def test_single_documents(folder, tmp_path):
    def single(spec):
        return open_source(str(spec)).is_single_document("text")

    for number in (0, 1, 2):
        path = tmp_path / f"{number}.jsonl"
        lines = [json.dumps({"text": text}) for text in ("", *["x"] * number)] + ["bad"]
        path.write_text("\n".join(lines))
        assert single(path) == (number == 1)
    assert single(folder / "b.txt")
    assert not single(folder / "*" / "*.md") or len(names(folder / "*" / "*.md")) == 1
    (folder / "a" / "y.md").write_text("another")
    assert not single(folder / "a" / "*.md")


@pytest.fixture
def hub_folder(tmp_path):
    """A data set repository as it is on the hub: a card with configurations, and data files."""
    root = tmp_path / "hub"
    (root / "one").mkdir(parents=True)
    for name, rows in (("train", ["a", "b", "c"]), ("validation", ["d"])):
        lines = (json.dumps({"text": row, "id": 1}) for row in rows)
        (root / "one" / f"{name}.jsonl").write_text("\n".join(lines))
    (root / "two.jsonl").write_text('{"text": "two"}\n{"text": null}\n')
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: one\n  default: true\n  data_files:\n"
        "  - {split: train, path: one/train.jsonl}\n"
        "  - {split: validation, path: one/validation.jsonl}\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    return root


def test_hugging_face_datasets_are_streamed(hub_folder):
    assert texts(f"hf:{hub_folder}") == ["a", "b", "c"]
    assert texts(f"hf:{hub_folder}::validation") == ["d"]
    (part,) = open_source(f"hf:{hub_folder}:one:train").parts
    skipped = list(part.read("text", 2))
    assert [record.origin for record in skipped] == [f"hf:{hub_folder}: row 2"]
    assert part.size is None
    good, bad = next(iter(open_source(f"hf:{hub_folder}:two").parts)).read("text", 0)
    assert good.read(0, 3) == b"two"
    assert bad.reason == "the text is null"


def test_hugging_face_datasets_that_cannot_be_read(hub_folder):
    with pytest.raises(DataError, match="no column 'txt'; it has text, id"):
        texts(f"hf:{hub_folder}", "txt")
    with pytest.raises(DataError, match=r"hf:.*cannot be read"):
        texts(f"hf:{hub_folder}:three")
    with pytest.raises(DataError, match=r"hf:.*cannot be read"):
        texts(f"hf:{hub_folder}::test")
    with pytest.raises(ConfigError, match="write hf:name"):
        open_source("hf:")


def test_an_id_that_is_no_path_is_a_dataset(monkeypatch):
    (part,) = open_source("some-org/some.data").parts
    assert (part.name, part.size) == ("some-org/some.data", None)
    with pytest.raises(DataError, match="no such file"):
        open_source("some-org/missing.txt")
    with pytest.raises(DataError, match="no such file"):
        open_source("missing")


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    for spec in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match=r"a\.txt: No such file"):
            open_source(str(spec))

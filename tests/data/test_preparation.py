"""Preparation: the ids of every document, the same bytes whatever stops it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from factorlm.data import PrepareConfig, load_tokenizer, open_dataset, prepare
from factorlm.data import documents as documents_module
from factorlm.data import planning as planning_module
from factorlm.data import preparation as preparation_module
from factorlm.errors import ConfigError, DataError, StorageError
from factorlm.storage import folder_lock
from factorlm.testing.faults import SimulatedCrash, crash_at


@pytest.fixture
def corpus(tmp_path, make_text):
    """A source of each kind, with long and empty documents, and bad records for the tolerant."""
    root = tmp_path / "corpus"
    (root / "notes").mkdir(parents=True)
    for number in range(23):
        (root / "notes" / f"{number:02d}.txt").write_text(make_text(7 * number, number))
    texts = [make_text(20 * (number % 9), number) for number in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.table({"text": [make_text(1500, 1), *texts[:15], make_text(900, 2)]})
    pq.write_table(table, root / "rows.parquet", row_group_size=5)
    return root


@pytest.fixture
def small_pieces(monkeypatch):
    """Everything happens often: cuts, tasks, commits. A simulated crash loses no page cache."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 2000)
    monkeypatch.setattr(planning_module, "PIECE_BYTES", 2000)
    monkeypatch.setattr(documents_module, "WINDOW_BYTES", 300)
    monkeypatch.setattr(preparation_module, "COMMIT_BYTES", 8000)


def config_for(corpus, output, **options):
    defaults = {
        "sources": (str(corpus / "notes"), str(corpus / "lines.jsonl.gz")),
        "val_sources": (str(corpus / "rows.parquet"),),
        "output": str(output),
        "tokenizer": "bpe:400",
        "workers": 1,
        "shard_tokens": 3000,
    }
    return PrepareConfig(**defaults | options)


def snapshot(folder):
    """Every file but the lock."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def documents_of(ids, eos_id):
    """The documents that end in a stream, without their ends."""
    ends = np.flatnonzero(ids == eos_id)
    return [part.tolist() for part in np.split(ids, ends + 1)[:-1] for part in [part[:-1]]]


def test_the_ids_are_each_documents_and_its_end(corpus, tmp_path, all_ids, make_text):
    """Against transformers, which gets the whole text of each document at once."""
    dataset = prepare(config_for(corpus, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    theirs.backend_tokenizer.encode_special_tokens = True

    def expected(texts):
        return [theirs.backend_tokenizer.encode(text).ids for text in texts if text]

    notes = [path.read_bytes().decode() for path in sorted((corpus / "notes").iterdir())]
    lines = gzip.decompress((corpus / "lines.jsonl.gz").read_bytes()).decode().splitlines()
    lines = [json.loads(line)["text"] for line in lines]
    rows = pq.read_table(corpus / "rows.parquet")["text"].to_pylist()
    for split, texts in (("train", notes + lines), ("validation", rows)):
        found = dataset.split(split)
        assert documents_of(all_ids(found), dataset.eos_id) == expected(texts)
        assert found.num_documents == sum(map(bool, texts))
        assert found.num_text_bytes == sum(len(text.encode()) for text in texts)
        assert found.num_tokens == sum(map(len, expected(texts))) + found.num_documents
    assert dataset.manifest.extra["num_records"] == len(notes + lines + rows)
    assert dataset.manifest.extra["num_empty_documents"] == (notes + lines + rows).count("")
    dataset.verify()


def test_the_output_does_not_depend_on_workers_or_pieces(
    corpus, tmp_path, tokenizer_folders, request
):
    options = {"tokenizer": str(tokenizer_folders["digits-in-threes"])}
    prepare(config_for(corpus, tmp_path / "a", **options))
    request.getfixturevalue("small_pieces")
    prepare(config_for(corpus, tmp_path / "b", **options))
    prepare(config_for(corpus, tmp_path / "c", workers=2, **options))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") == snapshot(tmp_path / "c")
    assert len(snapshot(tmp_path / "a")) > 10


@pytest.mark.parametrize(
    ("tokenizer", "step"),
    [("bytes", 13), ("bpe:400", 29), pytest.param("bytes", 1, marks=pytest.mark.slow)],
)
def test_a_crash_at_any_file_operation_changes_nothing(
    corpus, tmp_path, small_pieces, tokenizer, step
):
    options = {"tokenizer": tokenizer, "shard_tokens": 9000}
    with crash_at() as trace:
        prepare(config_for(corpus, tmp_path / "undisturbed", **options))
    expected = snapshot(tmp_path / "undisturbed")
    for operation in range(1, len(trace) + 1, step):
        config = config_for(corpus, tmp_path / f"out-{operation}", **options)
        with pytest.raises(SimulatedCrash), crash_at(operation):
            prepare(config)
        prepare(config)
        assert snapshot(tmp_path / f"out-{operation}") == expected


def test_shards_are_durable_before_the_manifest(corpus, tmp_path, small_pieces):
    with crash_at() as trace:
        prepare(config_for(corpus, tmp_path / "out"))
    last = {operation: len(trace) - 1 - trace[::-1].index(operation) for operation in trace}
    sealed = max(place for operation, place in last.items() if operation[0] == "create")
    assert trace[sealed][1].startswith(".tmp-manifest.json")
    for name in os.listdir(tmp_path / "out" / "shards"):
        assert last["write", name] < last["fsync", name] < last["fsync_path", "shards"] < sealed
    assert trace[-1] == ("remove", "progress.json")


def test_many_crashes_in_a_row_still_get_through(corpus, tmp_path, small_pieces):
    prepare(config_for(corpus, tmp_path / "undisturbed"))
    config, attempts = config_for(corpus, tmp_path / "out"), 0
    while True:
        try:
            with crash_at(45):
                prepare(config)
            break
        except SimulatedCrash:
            attempts += 1
    assert attempts > 3
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")


def test_another_attempt_may_have_another_number_of_workers(corpus, tmp_path, small_pieces):
    prepare(config_for(corpus, tmp_path / "undisturbed"))
    config = config_for(corpus, tmp_path / "out", workers=2)
    with pytest.raises(SimulatedCrash), crash_at(60):
        prepare(config)
    prepare(config.replace(workers=1))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")


def test_work_that_is_done_again_is_less_than_a_shard(corpus, tmp_path, small_pieces):
    config = config_for(corpus, tmp_path / "out", shard_tokens=2000)
    with pytest.raises(SimulatedCrash), crash_at(100):
        prepare(config)
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    durable = sum(stream["num_tokens"] for stream in progress["streams"].values())
    written = sum(path.stat().st_size // 2 for path in (tmp_path / "out" / "shards").iterdir())
    assert 0 < durable <= written <= durable + 2000 + 2000


def test_tail_split_of_a_single_document(tmp_path, all_ids, prepared):
    text = "".join(map(chr, range(32, 127))) * 100
    dataset = prepared({"one": text}, val_fraction=0.1)
    cut = int(len(text) * 0.9)
    assert bytes(all_ids(dataset.split("train")).tolist()) == text[:cut].encode()
    assert all_ids(dataset.split("validation")).tolist() == [*text[cut:].encode(), 256]
    (source,) = dataset.manifest.extra["sources"]
    assert source["split"] == {"rule": "tail of the text", "fraction": 0.1}


def test_split_by_document(tmp_path, all_ids):
    path = tmp_path / "a.jsonl"
    texts = [f"document {number}" for number in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def validation(name, **options):
        config = PrepareConfig(
            sources=(str(path),), output=str(tmp_path / name), tokenizer="bytes", workers=1,
            **options,
        )  # fmt: skip
        dataset = prepare(config)
        splits = [documents_of(all_ids(split), 256) for split in dataset.splits.values()]
        found = [[bytes(document).decode() for document in split] for split in splits]
        assert sorted(found[0] + found[1]) == sorted(texts)
        return found[1]

    default = validation("default")
    assert len(default) == 20
    assert validation("again", val_fraction=0.1) == default
    assert validation("seed", seed=1) != default
    assert len(validation("half", val_fraction=0.5)) == 100


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    config = PrepareConfig(
        sources=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "out"), tokenizer="bytes",
        val_fraction=0.01, workers=1,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"split 'validation' got no text of 2 records .*=0.01"):
        prepare(config)


def test_no_text_at_all_is_refused(tmp_path, prepared):
    with pytest.raises(DataError, match="split 'train' got no text of 1 records"):
        prepared({"a": ""})


def write_bad_lines(path, good, bad):
    lines = [json.dumps({"text": f"text {number}"}) for number in range(good)]
    for place in np.linspace(1, max(good - 1, 1), bad).astype(int):
        lines.insert(int(place), '{"txt": 1}' if place % 2 else "{")
    path.write_text("\n".join(lines) + "\n")


def test_a_bad_record_stops_strict_preparation_and_tolerance_may_come_later(tmp_path, all_ids):
    path = tmp_path / "a.jsonl"
    write_bad_lines(path, good=4000, bad=4)
    config = PrepareConfig(
        sources=(str(path),), output=str(tmp_path / "out"), tokenizer="bytes", workers=1
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: no 'text'"):
        prepare(config)
    dataset = prepare(config.replace(tolerant=True))
    facts = dataset.manifest.extra
    assert facts["rejected"] == {"no 'text'": 3, "not JSON": 1}
    assert facts["num_records"] == 4004
    assert sum(split.num_documents for split in dataset.splits.values()) == 4000


@pytest.mark.parametrize(("good", "bad"), [(100, 1), (3990, 5), (25_000, 40)])
def test_tolerance_ends_above_a_thousandth(tmp_path, good, bad):
    path = tmp_path / "a.jsonl"
    write_bad_lines(path, good, bad)
    config = PrepareConfig(
        sources=(str(path),), output=str(tmp_path / "out"), tokenizer="bytes", workers=1,
        tolerant=True,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"records are bad \(.* no 'text'.*more than the 0\.1%"):
        prepare(config)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_finished_folder_is_only_opened(corpus, tmp_path):
    config = config_for(corpus, tmp_path / "out")
    prepare(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    with crash_at() as trace:
        prepare(config.replace(workers=2, tolerant=True))
    assert trace == []
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(ConfigError, match=r"a finished .*tokenizer was 'bpe:400' and is 'bytes'"):
        prepare(config.replace(tokenizer="bytes"))
    (corpus / "notes" / "new.txt").write_text("new")
    with pytest.raises(ConfigError, match="inputs was"):
        prepare(config)


def test_an_unfinished_folder_goes_on_with_the_same_settings_only(corpus, tmp_path, small_pieces):
    config = config_for(corpus, tmp_path / "out")
    with pytest.raises(SimulatedCrash), crash_at(60):
        prepare(config)
    with pytest.raises(ConfigError, match=r"an unfinished .*\(seed was 0 and is 1\)"):
        prepare(config.replace(seed=1))
    (corpus / "notes" / "05.txt").touch()
    with pytest.raises(ConfigError, match="input files changed since it was begun"):
        prepare(config)


def test_a_tokenizer_that_could_not_be_made_may_be_corrected(corpus, tmp_path):
    config = config_for(corpus, tmp_path / "out")
    with pytest.raises(ConfigError, match="tokenizer="):
        prepare(config.replace(tokenizer="/"))
    assert prepare(config).split("train").num_tokens


def test_a_folder_with_other_files_is_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex"):
        prepare(config_for(corpus, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == {"thesis.tex": b"precious"}


def test_damaged_progress_and_lost_shards_are_noticed(corpus, tmp_path, small_pieces):
    config = config_for(corpus, tmp_path / "out")
    with pytest.raises(SimulatedCrash), crash_at(100):
        prepare(config)
    path = tmp_path / "out" / "progress.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"record": ', b'"record": 1'))
    with pytest.raises(DataError, match=r"progress\.json: damaged"):
        prepare(config)
    path.write_bytes(whole)
    for shard in (tmp_path / "out" / "shards").iterdir():
        shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.bin"):
        prepare(config)


def test_a_folder_in_use_is_refused(corpus, tmp_path):
    with (
        folder_lock(tmp_path / "out", owner="factorlm prepare"),
        pytest.raises(StorageError, match=r"out is in use by factorlm prepare \(process"),
    ):
        prepare(config_for(corpus, tmp_path / "out"))


def test_a_damaged_file_stops_tolerant_preparation_too(corpus, tmp_path):
    path = corpus / "lines.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"lines\.jsonl\.gz:\d+: cannot be read: Truncated"):
        prepare(config_for(corpus, tmp_path / "out", tolerant=True))


def test_the_tokenizer_sees_training_text_only(tmp_path):
    """The validation tail repeats a word that would be one token had it been trained on."""
    (tmp_path / "a.txt").write_text("abc def " * 900 + "xyzzy " * 133)
    config = PrepareConfig(
        sources=(str(tmp_path / "a.txt"),), output=str(tmp_path / "out"), tokenizer="bpe:300",
        workers=1, val_fraction=0.1,
    )  # fmt: skip
    tokenizer = prepare(config).load_tokenizer()
    assert len(tokenizer.encode(" abc def")) == 2
    assert len(tokenizer.encode(" xyzzy")) == 6


def test_a_sample_is_bounded_and_from_all_over(tmp_path):
    from fractions import Fraction

    from factorlm.data.planning import Planner
    from factorlm.data.sources import open_source
    from factorlm.data.splits import ByDocument

    for number in range(300):
        (tmp_path / f"{number:03d}.txt").write_text(f"{number:03d}" * 1000)
    source = open_source(str(tmp_path))
    planner = Planner([source], [ByDocument(Fraction("0.1"), 0, 0)], "text", False)
    sample = "".join(planner.sample(300_000))
    assert 250_000 < len(sample) <= 300_000
    seen = {int(sample[at : at + 3]) for at in range(0, len(sample) - 2, 3)}
    assert len(seen) > 80
    assert min(seen) < 10
    assert max(seen) > 290
    assert len("".join(planner.sample(10**9))) == 270 * 3000


def test_progress_is_reported(corpus, tmp_path, small_pieces):
    seen = []
    dataset = prepare(config_for(corpus, tmp_path / "out"), seen.append)
    positions = [state.input_bytes for state in seen]
    assert positions == sorted(positions)
    assert positions[-1] == seen[-1].total_input_bytes
    splits = dataset.splits.values()
    assert seen[-1].num_tokens == sum(split.num_tokens for split in splits)
    assert seen[-1].num_text_bytes == sum(split.num_text_bytes for split in splits)


def test_weights_are_kept(tmp_path, prepared):
    dataset = prepared({"a": "x" * 50, "b": "y" * 50}, weights=(1, 0.5))
    assert [stream.weight for stream in dataset.split("train").streams] == [1, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "sources: name at least one"),
        ({"output": ""}, "output: name a folder"),
        ({"val_fraction": 1.0}, r"val_fraction=1\.0 must be in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"val_fraction=-0\.1 must be"),
        ({"val_fraction": float("nan")}, "val_fraction=nan must be"),
        ({"val_fraction": 0.1, "val_sources": ("b",)}, "give one of them"),
        ({"weights": (1.0, 2.0)}, "weights: 2 for 1 sources"),
        ({"weights": (0.0,)}, r"weights=\[0\.0\] must be positive"),
        ({"weights": (float("inf"),)}, "must be positive"),
        ({"workers": 0}, "workers=0 must be >= 1"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be >= 1"),
        ({"tokenizer": "bpe:9"}, "at least 257"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"sources": ("a",), "output": "b"} | change)


KILLED = """
import sys
from factorlm.cli.main import main
from factorlm.data import documents, planning, preparation
documents.PIECE_BYTES = planning.PIECE_BYTES = 2000
preparation.COMMIT_BYTES = 20_000
sys.exit(main(["prepare", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_random_times(tmp_path, make_text, workers):
    texts = [make_text(400, number) for number in range(150)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    generator, kills = random.Random(0), 0

    def command(name):
        options = ["--tokenizer", "bpe:300", "--workers", workers, "--shard-tokens", "30000"]
        return [
            sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), "-o", str(tmp_path / name),
            *options,
        ]  # fmt: skip

    begin = time.monotonic()
    subprocess.run(command("undisturbed"), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    code, longest = None, seconds
    while kills < 40 and (code != 0 or kills == 0):
        if code == 0:  # it was quicker than the undisturbed one: again, and kill sooner
            shutil.rmtree(tmp_path / "out")
            longest /= 2
        process = subprocess.Popen(command("out"), stdout=subprocess.DEVNULL)
        latest = seconds if kills else longest
        killer = threading.Timer(generator.uniform(0.3, 1.0) * latest, process.kill)
        killer.start()
        code = process.wait()
        killer.cancel()
        kills += code != 0
    assert kills > 0
    assert code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")
    open_dataset(tmp_path / "out").verify()
    load_tokenizer(tmp_path / "out" / "tokenizer")


def test_a_full_disk_is_a_storage_error_and_the_next_attempt_goes_on(tmp_path, make_text):
    """A limit on the size of files stands for a disk without room; 6 is the code for storage."""
    path = tmp_path / "a.txt"
    path.write_text(make_text(30_000))
    code = (
        "import resource, sys\n"
        "from factorlm.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "sys.exit(main(['prepare', *sys.argv[1:], '--tokenizer', 'bytes', '--workers', '1']))\n"
    )
    command = [sys.executable, "-c", code, str(path), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 6
    assert "train-00-00000.bin: [Errno 27] File too large" in done.stderr
    config = PrepareConfig(
        sources=(str(path),), output=str(tmp_path / "out"), tokenizer="bytes", workers=1
    )
    prepare(config)
    prepare(config.replace(output=str(tmp_path / "undisturbed")))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")


def test_a_config_is_read_from_plain_values():
    config = PrepareConfig(sources=("a", "b"), output="c", weights=(1, 0.5), val_sources=("d",))
    assert PrepareConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="Did you mean 'tokenizer'"):
        PrepareConfig.from_dict({"sources": ["a"], "output": "c", "tokeniser": "bytes"})


@pytest.mark.slow
def test_memory_of_all_processes_is_bounded_whatever_the_input(tmp_path, make_text):
    """One document of 80 MB with a BPE and two workers: far below 1.5 GB in sum."""
    part = make_text(150_000)
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(80_000_000 // len(part.encode())):
            file.write(part)
    process = psutil.Popen(
        [sys.executable, "-m", "factorlm", "prepare", str(tmp_path / "a.txt"), "-o",
         str(tmp_path / "out"), "--tokenizer", "bpe:600", "--workers", "2"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = [process, *process.children()]
            peak = max(peak, sum(member.memory_full_info().pss for member in family))
        time.sleep(0.1)
    assert process.returncode == 0
    assert 50e6 < peak < 700e6

"""Tables of latencies: what they decide, and how they are kept."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from factorlm.errors import StorageError
from factorlm.inference import LatencyTable, LayerCase, TokenLatency, latency
from factorlm.inference.latency import cached_table, save_table, table_path
from factorlm.layers import BlockShuffleConfig, DenseConfig, LowRankConfig
from factorlm.storage import write_sealed_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def row(num_tokens: int, structured: float, merged: float, noise: float = 0.1) -> TokenLatency:
    return TokenLatency(
        num_tokens=num_tokens, structured_ms=structured, merged_ms=merged, noise_ms=noise
    )


TABLE = LatencyTable((row(1, 3.0, 1.0), row(2, 3.0, 2.95), row(4, 4.0, 2.0), row(8, 4.0, 9.0)))


def case_of(**changes: object) -> LayerCase:
    layer = LowRankConfig(rank=3).build(6, 10, dtype=torch.bfloat16)
    return LayerCase(**(vars(LayerCase.of(layer)) | changes))


# Deciding ------------------------------------------------------------------------------------


def test_merged_where_it_is_faster_by_more_than_noise() -> None:
    assert [r.num_tokens for r in TABLE.rows if r.merges] == [1, 4]
    assert TABLE.policy.token_counts == (1, 2, 4, 8)
    assert TABLE.policy.merged == (True, False, True, False)
    assert not row(1, 2.0, 1.5, noise=0.5).merges


def test_time_saved_per_token() -> None:
    """(3 - 1) / 1 + (4 - 2) / 4."""
    assert TABLE.saved_ms_per_token(TABLE.policy) == pytest.approx(2.5)


def test_extended_beyond_its_last_row_where_that_is_merged() -> None:
    other = LatencyTable((row(8, 1.0, 0.0), row(16, 5.0, 1.0)))
    assert TABLE.extended_by(other) == TABLE
    merged = LatencyTable((*TABLE.rows[:3], row(8, 4.0, 2.0)))
    assert merged.extended_by(other).rows == (*merged.rows, other.rows[1])


# Cases ---------------------------------------------------------------------------------------


def test_a_case_is_what_decides_the_time() -> None:
    layer = LowRankConfig(rank=3, init="structure_aware").build(6, 10, dtype=torch.bfloat16)
    case = LayerCase.of(layer)
    assert case == case_of()
    assert case.copy_bytes == 6 * 10 * 2
    assert str(case) == "low_rank 6x10 bfloat16"
    assert case.has_factors
    assert not LayerCase.of(DenseConfig().build(6, 10)).has_factors


# The cache -----------------------------------------------------------------------------------


def test_what_is_kept_is_read_back(cache: Path) -> None:
    path = save_table(case_of(), TABLE)
    assert path.parent == cache / "premerge"
    assert cached_table(case_of()) == TABLE
    save_table(case_of(), LatencyTable(TABLE.rows[:1]))
    assert cached_table(case_of()) == LatencyTable(TABLE.rows[:1])
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize(
    "changes",
    [
        {"config": LowRankConfig(rank=2)},
        {"config": BlockShuffleConfig(num_blocks=2)},
        {"in_features": 8},
        {"out_features": 8},
        {"bias": False},
        {"dtype": torch.float16},
        {"device_type": "cuda"},
        {"device_name": "another"},
    ],
    ids=str,
)
def test_another_case_has_another_table(changes: dict) -> None:
    save_table(case_of(), TABLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached_table(case_of(**changes)) is None


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("torch.get_num_threads", lambda: 77),
        ("torch.__version__", "0.0"),
        ("importlib.metadata.version", lambda name: "0.0"),
    ],
)
def test_other_threads_and_versions_have_other_tables(
    target: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_table(case_of(), TABLE)
    monkeypatch.setattr(target, value)
    assert cached_table(case_of()) is None


def test_another_triton_has_other_tables_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = case_of(device_type="cuda")
    for case in (case_of(), cuda):
        monkeypatch.setattr(latency, "_triton_version", lambda: "3.7.1")
        save_table(case, TABLE)
        assert case.key().get("triton") == ("3.7.1" if case is cuda else None)
        monkeypatch.setattr(latency, "_triton_version", lambda: "3.8.0")
        assert cached_table(case) == (None if case is cuda else TABLE)


def test_the_version_of_triton_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    monkeypatch.setattr(latency, "has_triton", lambda: True)
    assert latency._triton_version() == "3.7.1"
    monkeypatch.setattr(latency, "has_triton", lambda: False)
    assert latency._triton_version() is None


def damage_text(path: Path) -> None:
    path.write_text(path.read_text().replace("3.0", "1.0", 1))


def seal(**changes: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        body = json.loads(path.read_text())
        del body["sha256"]
        write_sealed_json(path, body | changes)

    return write


def as_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_ROW = {"num_tokens": 1, "structured_ms": -1.0, "merged_ms": 1.0, "noise_ms": 0.0}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed number": damage_text,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00garbage"),
    "another's JSON": lambda path: path.write_text('{"rows": []}'),
    "a list": lambda path: path.write_text("[1, 2]"),
    "another format": seal(format_version=1),
    "another key": seal(key={"torch": "x"}),
    "no rows": seal(rows=[]),
    "rows of another shape": seal(rows=[[1, 2]]),
    "unknown fields": seal(rows=[BAD_ROW | {"more": 1}]),
    "a negative time": seal(rows=[BAD_ROW]),
    "text for a time": seal(rows=[BAD_ROW | {"structured_ms": "1"}]),
    "counts that descend": seal(rows=[BAD_ROW | {"structured_ms": 1.0}] * 2),
    "a link": as_link,
    "a folder": as_folder,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning(name: str) -> None:
    path = save_table(case_of(), TABLE)
    DAMAGES[name](path)
    with pytest.warns(UserWarning, match=rf"{path.name} is not used: .*`factorlm tune`"):
        assert cached_table(case_of()) is None


def test_a_damaged_file_is_written_anew() -> None:
    damage_text(save_table(case_of(), TABLE))
    save_table(case_of(), TABLE)
    assert cached_table(case_of()) == TABLE


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file")
    assert cached_table(case_of()) is None
    with pytest.raises(StorageError, match="cannot write"):
        save_table(case_of(), TABLE)
    assert table_path(case_of()).is_relative_to(cache)

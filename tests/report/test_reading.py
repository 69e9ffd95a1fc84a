from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from factorlm.errors import DataError
from factorlm.report import gather, read_run
from factorlm.report.compare import METRICS
from factorlm.report.reading import every_kth, find_files


def test_a_folder_is_searched_and_read_once(study: Path) -> None:
    report = gather([study, study / "dense-0", study / "speed.jsonl"])
    assert [run.label for run in report.runs] == ["blocks", "dense-0", "dense-1", "low"]
    assert [run.path.parent.name for run in report.runs] == [run.label for run in report.runs]
    assert len(report.benchmarks) == 2
    assert report.left_out == ()
    assert report.families == ("block_dense", "dense", "low_rank, 32%")


def test_numbers_are_those_of_all_steps(study: Path, write_run) -> None:
    long = write_run("long", losses=[3.0 + (step % 7) / 10 for step in range(3000)])
    for run in gather([study, long]).runs:
        expected = read_run(run.path)
        assert run.metrics == {metric.key: metric.value(expected) for metric in METRICS}
        assert run.num_steps_done == expected.steps[-1].step
        assert run.summary.evals == expected.evals
        assert len(run.training.loss) == len(run.summary.steps) <= 500


def test_many_runs_share_the_points(write_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorlm.report.reading.ALL_POINTS", 400)
    monkeypatch.setattr("factorlm.report.reading.MIN_POINTS", 10)
    paths = [write_run(str(index), losses=[2.0] * 700) for index in range(10)]
    assert {len(run.training.loss) <= 40 for run in gather(paths).runs} == {True}


def test_monitors_are_thinned_to_the_last(write_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorlm.report.reading.ALL_MONITORED", 4 * 2 * 12)
    runs = gather([write_run(name, is_monitored=True) for name in "ab"]).runs
    for run in runs:
        assert len(run.summary.monitors) <= 12
        assert run.summary.monitors[-1].step == 40


@pytest.mark.parametrize(("count", "limit"), [(0, 3), (1, 3), (3, 3), (4, 3), (100, 7)])
def test_every_kth(count: int, limit: int) -> None:
    kept = every_kth(range(count), limit)
    assert len(kept) <= limit
    assert not count or kept[-1] == count - 1
    assert len({b - a for a, b in itertools.pairwise(kept)}) <= 1


def test_runs_of_one_name_have_their_path(write_run) -> None:
    paths = [write_run("a", folder) for folder in ("one", "two")]
    labels = [run.label for run in gather(paths).runs]
    assert labels == [str(path / "records.jsonl") for path in paths]
    assert [run.summary.label for run in gather(paths).runs] == labels


def test_what_a_folder_holds_besides_is_left_out_by_name(study: Path) -> None:
    before = len(gather([study]).runs)
    (study / "other.jsonl").write_text('{"loss": 1}\n{"loss": 2}\n')
    (study / "empty.jsonl").touch()
    damaged = study / "dense-1" / "records.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([*lines[:5], lines[5][:40], *lines[6:]]) + "\n")
    report = gather([study])
    assert len(report.runs) == before - 1
    reasons = dict(reason.split(": ", 1) for reason in report.left_out)
    assert reasons.keys() == {
        f"{damaged}:6",
        str(study / "empty.jsonl"),
        f"{study / 'other.jsonl'}:1",
    }
    assert "a JSON object with type, format_version" in reasons[f"{damaged}:6"]
    assert "no training step and no benchmark" in reasons[str(study / "empty.jsonl")]


def test_what_is_named_has_to_be_good(study: Path, tmp_path: Path) -> None:
    (study / "bad.jsonl").write_text("{}\n\n{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not a record"):
        gather([study, study / "bad.jsonl"])
    with pytest.raises(DataError, match=r"studi: no such file or folder\."):
        gather([study.parent / "studi"])
    with pytest.raises(DataError, match=r"dense-2: no such file.* Did you mean 'dense-[01]'\?"):
        gather([study / "dense-2"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"no records in it: no file below it ends in \.jsonl"):
        gather([tmp_path / "nothing"])
    (tmp_path / "nothing" / "x.jsonl").write_text("{}\n\n")
    with pytest.raises(DataError, match=r"(?s)no run with a step and no benchmark.*x\.jsonl:1"):
        gather([tmp_path / "nothing"])


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(write_run) -> None:
    path = write_run("a", finished=False) / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (run,) = gather([path]).runs
    assert not run.summary.is_finished
    assert find_files([path.parent, path]) == {path: True}


def test_gathering_changes_no_record(study: Path) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*.jsonl")}
    gather([study])
    assert {path: path.read_bytes() for path in study.rglob("*.jsonl")} == before

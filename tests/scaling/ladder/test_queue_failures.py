"""What a queue does about runs that fail: each is tried once more, and stops no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.scaling.ladder.instant import Done, Instant, Refusing, run_queue

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.executors import Job
from factorlm.scaling.ladder.plan import Plan
from factorlm.scaling.ladder.state import Status


def test_a_failure_is_tried_once_more_and_stops_nothing(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant(dense_a_s0=[8, 0], dense_b_s0=[8, 8])
    state, failures = run_queue(ladder(), tmp_path / "runs", executor)
    told = [(failure.run.name, failure.exit_code, failure.is_final) for failure in failures]
    assert sorted(told) == [
        ("dense-a-s0", 8, False),
        ("dense-b-s0", 8, False),
        ("dense-b-s0", 8, True),
    ]
    assert failures[0].reason.endswith("went wrong")
    assert state.status["dense-b-s0"] is Status.FAILED
    assert state.count(Status.DONE) == 5
    later, _ = run_queue(ladder(), tmp_path / "runs", Instant())
    assert later.count(Status.DONE) == 6


def test_an_interrupted_run_goes_on_and_is_no_failure(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant(dense_a_s0=[75, 75, 75])
    state, failures = run_queue(ladder(), tmp_path / "runs", executor)
    assert executor.names.count("dense-a-s0") == 4
    assert state.count(Status.DONE) == 6
    assert not failures


def test_a_run_that_is_interrupted_on_and_on_holds_up_no_other(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant(workers=1, dense_a_s0=[75] * 8)
    state, _ = run_queue(ladder(), tmp_path / "runs", executor)
    assert executor.names[:7].count("dense-a-s0") == 2
    assert state.count(Status.DONE) == 6


def test_a_run_that_is_interrupted_where_it_was_is_a_failure(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant(workers=1, steps_each=0, dense_a_s0=[75] * 8)
    state, failures = run_queue(ladder(), tmp_path / "runs", executor)
    assert [(failure.exit_code, failure.is_final) for failure in failures] == [
        (75, False),
        (75, True),
    ]
    assert state.count(Status.DONE) == 5


def test_a_submission_that_fails_is_tried_once_more_and_stops_nothing(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Refusing(dense_a_s0=[0], dense_b_s0=[0, 0])
    state, failures = run_queue(ladder(), tmp_path / "runs", executor)
    assert {failure.reason for failure in failures} == {
        "it could not be submitted: sbatch: error: Socket timed out"
    }
    assert len(failures) == 3
    assert state.status["dense-b-s0"] is Status.FAILED
    assert state.count(Status.DONE) == 5


def test_an_executor_that_takes_none_ends_the_queue(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    names = [run.name for run in Plan(ladder()).runs({})]
    executor = Refusing(workers=1, **{name.replace("-", "_"): [0, 0] for name in names})
    state, _ = run_queue(ladder(families={"dense": {}}), tmp_path / "runs", executor)
    assert state.count(Status.FAILED) == 3


def test_an_option_that_is_wrong_for_all_runs_is_told_at_once(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Refusing(error=ConfigError("executor.options={}: no"), dense_a_s0=[0])
    with pytest.raises(ConfigError, match=r"executor\.options"):
        run_queue(ladder(), tmp_path / "runs", executor)


def test_damaged_records_stop_no_other_run(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    run_queue(ladder(families={"dense": {}}), tmp_path / "runs", Instant())
    damaged = tmp_path / "runs/dense-a-s0/records.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], '{"cut', *lines[2:], ""]))
    executor = Instant()
    state, failures = run_queue(ladder(), tmp_path / "runs", executor)
    assert executor.names == [f"low_rank-{size}-s0" for size in "abc"]
    assert [(failure.run.name, failure.is_final) for failure in failures] == [("dense-a-s0", True)]
    assert f"{damaged}:2: not a record" in failures[0].reason
    assert (state.count(Status.DONE), state.count(Status.FAILED)) == (5, 1)


def test_a_run_without_an_evaluation_stops_no_other(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    class Blind(Instant):
        def submit(self, job: Job) -> Done:
            done = super().submit(job)
            path = Path(job.command[-1]) / job.name / "records.jsonl"
            if job.name == "dense-a-s0":
                lines = path.read_text().splitlines(keepends=True)
                path.write_text("".join(line for line in lines if '"eval"' not in line))
            return done

    state, failures = run_queue(ladder(), tmp_path / "runs", Blind())
    assert [failure.run.name for failure in failures] == ["dense-a-s0"]
    assert failures[0].reason.endswith("the run is finished without an evaluation")
    assert state.count(Status.DONE) == 5

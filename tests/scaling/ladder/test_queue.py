"""What the queue starts, and what it leaves alone; runs end at once here."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from tests.scaling.ladder.instant import Done, Instant, append, run_queue, run_records

from factorlm.errors import ConfigError, StorageError
from factorlm.records import EvalRecord, EventRecord, RecordFile, RunRecord, StepRecord
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.executors import Job
from factorlm.scaling.ladder.executors.base import run_job
from factorlm.scaling.ladder.folder import LadderFolder
from factorlm.scaling.ladder.plan import Plan
from factorlm.scaling.ladder.queue import Queue
from factorlm.scaling.ladder.state import Failure, State, Status
from factorlm.storage import folder_lock

TUNE = {"rule": "tune", "values": [1e-3, 2e-3, 4e-3], "sizes": ["a"]}


def test_everything_once_and_nothing_twice(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    file, first, again = ladder(), Instant(), Instant()
    state, failures = run_queue(file, tmp_path / "runs", first)
    assert first.names == [run.name for run in state.runs]
    assert set(state.losses) == set(first.names)
    assert not failures
    (tmp_path / "runs/dense-b-s0/records.jsonl").unlink()
    (tmp_path / "runs/dense-b-s0").rmdir()
    state, _ = run_queue(file, tmp_path / "runs", again)
    assert again.names == ["dense-b-s0"]
    assert state.count(Status.DONE) == 6


def test_a_run_is_a_recipe_that_anyone_can_run(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant()
    run_queue(ladder(), tmp_path / "runs", executor)
    job = executor.jobs[0]
    recipe = tmp_path / "runs/dense-a-s0.yaml"
    assert job.command[1:] == (
        "-m", "factorlm", "train", str(recipe), "--runs-dir", str(tmp_path / "runs"),
    )  # fmt: skip
    assert yaml.safe_load(recipe.read_text())["labels"]["family"] == "dense"
    assert job.env == {"OMP_NUM_THREADS": "1"}


def test_at_most_so_many_at_a_time(ladder: Callable[..., LadderFile], tmp_path: Path) -> None:
    file, seen = ladder(), []
    queue = Queue(
        Plan(file),
        LadderFolder(tmp_path / "runs"),
        Instant(workers=2),
        on_state=lambda state: seen.append(state.count(Status.RUNNING)),
        poll_seconds=0.001,
    )
    queue.run()
    assert max(seen) == 2


def test_rates_are_tuned_first_and_then_used(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant()
    state, _ = run_queue(ladder(rate=TUNE), tmp_path / "runs", executor)
    assert executor.names[:2] == ["tune-dense-a-0.001", "tune-dense-a-0.002"]
    assert executor.names.index("tune-dense-a-0.004") < executor.names.index("dense-a-s0")
    assert {run.rate for run in state.runs if run.stage == "main"} == {2e-3}
    assert state.count(Status.DONE) == 12


def test_a_family_whose_rates_all_fail_waits_and_others_go_on(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    codes = {f"tune-dense-a-{rate:g}": [8, 8] for rate in (1e-3, 2e-3, 4e-3)}
    executor = Instant()
    executor.codes = codes  # type: ignore[assignment]
    state, _ = run_queue(ladder(rate=TUNE), tmp_path / "runs", executor)
    assert {state.status[f"dense-{size}-s0"] for size in "abc"} == {Status.WAITING}
    assert {state.status[f"low_rank-{size}-s0"] for size in "abc"} == {Status.DONE}


def test_steps_are_known_of_runs_that_a_grid_grew_by(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    file = ladder(families={"dense": {}}, rate=TUNE | {"values": [4e-3, 8e-3, 16e-3]})
    steps: dict[str, int] = {}
    queue = Queue(
        Plan(file),
        LadderFolder(tmp_path / "runs"),
        Instant(),
        on_state=lambda state: steps.update(state.num_steps),
        poll_seconds=0.001,
    )
    state = queue.run()
    assert "tune-dense-a-0.001" in steps
    assert steps == dict.fromkeys((run.name for run in state.runs), 3)


def test_a_changed_recipe_is_noticed(ladder: Callable[..., LadderFile], tmp_path: Path) -> None:
    run_queue(ladder(), tmp_path / "runs", Instant())
    changed = ladder(tokens={"rule": "fixed", "num_tokens": 5 * 128})
    with pytest.raises(ConfigError, match=r"batch\.num_tokens=640, was 384"):
        run_queue(changed, tmp_path / "runs", Instant())


def test_published_records_are_enough_and_thin(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    published, again = tmp_path / "published", Instant()
    run_queue(ladder(), tmp_path / "runs", Instant(), published)
    records = list(RecordFile(published / "dense-a-s0.jsonl"))
    assert [r.step for r in records if isinstance(r, StepRecord)] == [3]
    assert [type(r) for r in records] == [RunRecord, StepRecord, EvalRecord, EventRecord]
    state, _ = run_queue(ladder(), tmp_path / "elsewhere", again, published)
    assert again.names == []
    assert state.count(Status.DONE) == 6


def test_what_was_done_before_is_published_too(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    """As after a first command without ``--records``, or one killed as a run ended."""
    published, again = tmp_path / "published", Instant()
    state, _ = run_queue(ladder(), tmp_path / "runs", Instant())
    run_queue(ladder(), tmp_path / "runs", again, published)
    assert again.names == []
    names = sorted(path.stem for path in published.iterdir())
    assert names == sorted(run.name for run in state.runs)


def test_two_queues_do_not_share_a_folder(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    with (
        folder_lock(tmp_path / "runs", owner="factorlm scale run"),
        pytest.raises(StorageError, match="in use by factorlm scale run"),
    ):
        run_queue(ladder(), tmp_path / "runs", Instant())


def test_a_signal_lets_what_runs_end_and_starts_nothing_more(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    executor = Instant(workers=1, dense_a_s0=[None])
    queue = Queue(
        Plan(ladder()),
        LadderFolder(tmp_path / "runs"),
        executor,
        on_state=lambda state: os.kill(os.getpid(), signal.SIGINT),
        poll_seconds=0.001,
    )
    before = signal.getsignal(signal.SIGINT)
    state = queue.run()
    assert queue.was_stopped
    assert executor.names == ["dense-a-s0"]
    assert state.count(Status.DONE) == 0
    assert not list((tmp_path / "runs").glob(".*.stop"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_is_under_way_is_waited_for(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    """As after a queue was killed: its runs go on without it."""
    file, executor = ladder(), Instant()
    folder = LadderFolder(tmp_path / "runs")
    run = Plan(file).runs({})[0]
    held = folder_lock(folder.path / run.name, owner="factorlm train")
    held.__enter__()
    turns: list[Status] = []

    def watch(state: State) -> None:
        turns.append(state.status[run.name])
        if len(turns) == 5:
            for record in run_records(run.config.to_dict(), 1.0):
                RecordFile(folder.path / run.name / "records.jsonl").append(record)
            held.__exit__(None, None, None)

    state = Queue(Plan(file), folder, executor, on_state=watch, poll_seconds=0.001).run()
    assert turns[:5] == [Status.RUNNING] * 5
    assert run.name not in executor.names
    assert state.count(Status.DONE) == 6


def test_a_run_that_another_process_took_first_is_waited_for(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    """As after a queue was killed while its process was still starting."""
    folder = LadderFolder(tmp_path / "runs")
    run = Plan(ladder()).runs({})[0]
    held = folder_lock(folder.path / run.name, owner="factorlm train")
    turns: list[Status] = []

    class Late(Instant):
        def submit(self, job: Job) -> Done:
            if job.name == run.name:
                held.__enter__()
                self.jobs.append(job)
                return Done(6)
            return super().submit(job)

    def watch(state: State) -> None:
        turns.append(state.status[run.name])
        if len(turns) == 5:
            append(folder.path / run.name, run_records(run.config.to_dict(), 1.0))
            held.__exit__(None, None, None)

    executor = Late()
    failures: list[Failure] = []
    queue = Queue(
        Plan(ladder()),
        folder,
        executor,
        on_state=watch,
        on_failure=failures.append,
        poll_seconds=0.001,
    )
    state = queue.run()
    assert turns[:5] == [Status.RUNNING] * 5
    assert executor.names.count(run.name) == 1
    assert not failures
    assert state.count(Status.DONE) == 6


def test_what_an_executor_finds_again_is_not_submitted_twice(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    class Finding(Instant):
        def find(self, job: Job) -> Done | None:
            return self.submit(job) if job.name == "low_rank-b-s0" else None

    first = LadderFolder(tmp_path / "runs")
    first.path.mkdir()
    for run in Plan(ladder()).runs({}):
        first.write_recipe(run)
    executor = Finding()
    state, _ = run_queue(ladder(), tmp_path / "runs", executor)
    assert executor.names[0] == "low_rank-b-s0"
    assert executor.names.count("low_rank-b-s0") == 1
    assert state.count(Status.DONE) == 6


def test_an_old_stop_file_stops_no_new_run(
    ladder: Callable[..., LadderFile], tmp_path: Path
) -> None:
    class Seeing(Instant):
        def submit(self, job: Job) -> Done:
            assert not job.stop_file.exists()
            return super().submit(job)

    folder = LadderFolder(tmp_path / "runs")
    folder.path.mkdir()
    for run in Plan(ladder()).runs({}):
        folder.stop_file(run).touch()
    state, _ = run_queue(ladder(), folder.path, Seeing())
    assert state.count(Status.DONE) == 6


HOLDS = """
import signal, socket, sys, time
from factorlm.storage import folder_lock
socket.gethostname = lambda: "node17"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with folder_lock(sys.argv[1], owner="factorlm train"):
    time.sleep(600)
"""


def test_an_orphan_of_another_machine_is_stopped_by_its_file_alone(
    ladder: Callable[..., LadderFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a cluster whose queue is gone; what has its number here is another's."""
    folder = LadderFolder(tmp_path / "runs")
    run = Plan(ladder()).runs({})[0]
    command = (sys.executable, "-c", HOLDS, str(folder.path / run.name))
    job = dataclasses.replace(folder.job(run, 1), command=command)
    killed: list[int] = []
    kills = types.SimpleNamespace(kill=lambda pid, kind: killed.append(pid))
    monkeypatch.setattr("factorlm.scaling.ladder.orphan.os", kills)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(run_job, job)
        while folder.holder(run) is None:
            assert not task.done()
            time.sleep(0.05)
        queue = Queue(
            Plan(ladder()),
            folder,
            executor := Instant(),
            on_state=lambda state: queue.stop(),
            poll_seconds=0.01,
        )
        try:
            queue.run()
        finally:
            job.stop_file.touch()  # whatever happened
        assert task.result() == 75
    assert not killed
    assert run.name not in executor.names

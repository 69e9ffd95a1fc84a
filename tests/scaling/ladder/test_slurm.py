"""The Slurm executor on commands that stand for Slurm's: what it submits, finds again, cancels."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import pytest

from factorlm.scaling.ladder.config import ExecutorSection
from factorlm.scaling.ladder.executors import Executor, Job, build_executor

pytest.importorskip("submitit")

COMMANDS = {
    "srun": "",
    "sbatch": 'echo "Submitted batch job 42"',
    "sacct": 'echo "JobID|State|NodeList"; echo "42|$(cat {state})|None assigned"',
    "scancel": "echo CANCELLED > {state}",
}


class Cluster:
    """Has one job, number 42, in a state that the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = Job(
            name="dense-a-s0",
            command=(sys.executable, "-c", ""),
            folder=folder,
            log=folder / "dense-a-0.5.log",
            stop_file=folder / ".stop",
        )

    @property
    def state(self) -> str:
        return (self.folder / "state").read_text().strip()

    @state.setter
    def state(self, value: str) -> None:
        (self.folder / "state").write_text(value)

    def finish(self, code: int) -> None:
        """As submitit does where the job ran."""
        result = self.folder / "slurm/42/42_0_result.pkl"
        result.write_bytes(pickle.dumps(("success", code)))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    (tmp_path / "bin").mkdir()
    for name, line in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{line.format(state=tmp_path / 'state')}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    found = Cluster(tmp_path)
    found.state = "PENDING"
    return found


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """What submitit knows of jobs of this number, as in a new process."""
    import submitit

    submitit.SlurmJob.watcher.clear()


def executor(gpus: int | None = None) -> Executor:
    options = {"timeout_min": 7}
    return build_executor(ExecutorSection(kind="slurm", threads=2, gpus=gpus, options=options))


def test_a_job_asks_for_what_a_run_needs(cluster: Cluster) -> None:
    handle = executor().submit(cluster.job)
    assert handle.poll() is None
    script = (cluster.folder / "slurm/42/42_submission.sh").read_text()
    for line in ("--cpus-per-task=2", "--time=7", "--job-name=dense-a-s0", "--nodes=1"):
        assert f"#SBATCH {line}\n" in script
    cluster.finish(75)
    assert handle.poll() == 75


@pytest.mark.parametrize("gpus", [None, 0, 1])
def test_a_job_asks_for_gpus_if_it_is_told_to(cluster: Cluster, gpus: int | None) -> None:
    executor(gpus).submit(cluster.job)
    script = (cluster.folder / "slurm/42/42_submission.sh").read_text()
    assert ("#SBATCH --gpus-per-node" in script) == (gpus is not None)
    assert (f"--gpus-per-node={gpus}\n" in script) == (gpus is not None)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_the_next_queue_finds_the_job(cluster: Cluster, state: str) -> None:
    executor().submit(cluster.job)
    cluster.state = state
    found = executor().find(cluster.job)
    assert found is not None
    assert found.poll() is None
    cluster.finish(0)
    assert found.poll() == 0
    assert executor().find(cluster.job) is None


@pytest.mark.parametrize("state", ["CANCELLED by 0", "TIMEOUT", ""])
def test_a_job_that_is_gone_is_not_found(cluster: Cluster, state: str) -> None:
    assert executor().find(cluster.job) is None
    executor().submit(cluster.job)
    cluster.state = state
    import submitit

    submitit.SlurmJob.watcher.clear()
    assert executor().find(cluster.job) is None


def test_a_job_that_waits_is_cancelled(cluster: Cluster) -> None:
    handle = executor().submit(cluster.job)
    assert handle.poll() is None
    handle.stop()
    assert handle.poll() == 75
    assert cluster.state == "CANCELLED"


def test_a_job_that_has_begun_is_left_to_its_stop_file(cluster: Cluster) -> None:
    handle = executor().submit(cluster.job)
    assert handle.poll() is None
    cluster.state = "RUNNING"
    handle.stop()
    time.sleep(0.01)  # submitit asks at most once a millisecond
    assert handle.poll() is None
    assert cluster.job.stop_file.exists()
    assert cluster.state == "RUNNING"
    cluster.finish(75)
    assert handle.poll() == 75

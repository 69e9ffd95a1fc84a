"""Executors: one command, wherever it runs."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import ExecutorSection
from factorlm.scaling.ladder.executors import Executor, Handle, Job, build_executor
from factorlm.scaling.ladder.executors.base import run_job

WAITS = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    "print('on', flush=True); signal.pause()"
)


def job(folder: Path, code: str, name: str = "job") -> Job:
    return Job(
        name=name,
        command=(sys.executable, "-c", code),
        folder=folder,
        log=folder / f"{name}.log",
        stop_file=folder / ".stop",
        env={"FACTORLM_WORD": "spam"},
    )


def ended(handle: Handle, seconds: float = 60) -> int:
    end = time.monotonic() + seconds
    while (code := handle.poll()) is None:
        assert time.monotonic() < end, "the job did not end"
        time.sleep(0.05)
    return code


def wait_for_text(path: Path, text: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} never had {text!r}"
        time.sleep(0.05)


SECTIONS = {
    "local": ExecutorSection(workers=2),
    "ray": ExecutorSection(kind="ray", options={"num_cpus": 2}),
    "slurm": ExecutorSection(kind="slurm", options={"cluster": "local", "timeout_min": 5}),
}


@pytest.fixture(
    scope="module",
    params=["local", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ray", "slurm"))],
)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Each for real: Ray starts a cluster of its own, submitit its processes."""
    if request.param != "local":
        pytest.importorskip({"slurm": "submitit"}.get(request.param, request.param))
    with build_executor(SECTIONS[request.param]) as found:
        yield found


def test_a_job_runs_with_its_environment_in_its_folder(executor: Executor, tmp_path: Path) -> None:
    code = "import os; print(os.environ['FACTORLM_WORD'], os.getcwd())"
    assert ended(executor.submit(job(tmp_path, code))) == 0
    assert (tmp_path / "job.log").read_text().split() == ["spam", str(tmp_path)]


def test_an_exit_code_comes_back(executor: Executor, tmp_path: Path) -> None:
    assert ended(executor.submit(job(tmp_path, "raise SystemExit(8)"))) == 8


def test_a_job_that_is_stopped_may_save_first(executor: Executor, tmp_path: Path) -> None:
    handle = executor.submit(job(tmp_path, WAITS))
    wait_for_text(tmp_path / "job.log", "on")
    assert handle.poll() is None
    handle.stop()
    assert ended(handle) == 75


def test_a_job_that_was_stopped_before_it_began_does_not_run(tmp_path: Path) -> None:
    (tmp_path / ".stop").touch()
    assert run_job(job(tmp_path, "print('ran')")) == 75
    assert not (tmp_path / "job.log").exists()


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorlm.scaling.ladder.executors.local.num_cpu_cores", lambda: 7)
    assert build_executor(ExecutorSection(threads=2)).slots == 3
    assert build_executor(ExecutorSection(threads=9)).slots == 1
    assert build_executor(ExecutorSection(workers=5, threads=2)).slots == 5


@pytest.mark.parametrize("gpus", [None, 1])
def test_a_gpu_a_run(gpus: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    found = build_executor(ExecutorSection(gpus=gpus))
    assert found.slots == 2
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"
    first, second = (found.submit(job(tmp_path, code, name)) for name in "ab")
    for name, gpu in (("a", "3"), ("b", "5")):
        wait_for_text(tmp_path / f"{name}.log", f"{gpu}\n")
    first.stop()
    ended(first)
    third = found.submit(job(tmp_path, code, "c"))
    wait_for_text(tmp_path / "c.log", "3\n")
    for handle in (second, third):
        handle.stop()
        ended(handle)


@pytest.mark.parametrize(("gpus", "count"), [(0, 2), (None, 0)])
def test_runs_on_the_cpu_see_no_gpu(
    gpus: int | None, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("factorlm.scaling.ladder.executors.local.num_cpu_cores", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = build_executor(ExecutorSection(gpus=gpus))
    assert found.slots == 7
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert ended(found.submit(job(tmp_path, code))) == 0
    assert (tmp_path / "job.log").read_text() == "''\n"


@pytest.mark.parametrize(("gpus", "slots"), [(None, 2), (1, 2), (0, 8)])
def test_a_gpu_of_a_ray_cluster_a_run(
    gpus: int | None, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SmallRay({"CPU": 8.0, "GPU": 2.0}))
    assert build_executor(ExecutorSection(kind="ray", gpus=gpus)).slots == slots


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (ExecutorSection(kind="lokal"), r"executor\.kind='lokal' must be one of local, ray, slurm"),
        (ExecutorSection(options={"a": 1}), r"executor\.options={'a': 1}: 'local' takes none"),
        (ExecutorSection(gpus=1), r"executor\.gpus=1: this machine has no CUDA device"),
    ],
)
def test_wrong_sections(
    section: ExecutorSection, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        build_executor(section)


class SmallRay(types.ModuleType):
    """A Ray whose cluster has ``resources``."""

    def __init__(self, resources: dict[str, float]) -> None:
        super().__init__("ray")
        self.resources, self.is_up = resources, False

    def init(self, **options: object) -> None:
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, function: object) -> object:
        return function


def test_a_ray_cluster_without_room_is_refused_before_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = SmallRay({"CPU": 3.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ConfigError, match=r"threads=4, gpus=0: the Ray cluster has 3 CPUs and 0"):
        build_executor(ExecutorSection(kind="ray", threads=4))
    assert not ray.is_up


def test_a_ray_cluster_that_shrinks_still_takes_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SmallRay({"CPU": 8.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    found = build_executor(ExecutorSection(kind="ray", threads=4))
    assert found.slots == 2
    ray.resources = {"CPU": 2.0}
    assert found.slots == 1


@pytest.mark.parametrize(("kind", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"executor\.kind='{kind}' needs .*factorlm\[cluster\]"):
        build_executor(ExecutorSection(kind=kind))

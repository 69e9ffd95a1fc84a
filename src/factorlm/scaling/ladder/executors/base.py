"""What executors have in common: jobs, handles, and a command that can be stopped from afar."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from factorlm.config import check
from factorlm.errors import InterruptedRun, did_you_mean
from factorlm.registry import Registry
from factorlm.scaling.ladder.config import ExecutorSection

INTERRUPTED = InterruptedRun.exit_code
"""Exit code of a run that stopped with a complete checkpoint."""
POLL_SECONDS = 0.5
"""Between two looks at a stop file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process to run."""

    name: str
    command: tuple[str, ...]
    folder: Path
    """The working folder."""
    log: Path
    """Output is appended here."""
    stop_file: Path
    """Once it is there, the process is told to end."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Over the environment."""


def on_gpu(job: Job, gpu: str) -> Job:
    """The job on that GPU alone, as ``CUDA_VISIBLE_DEVICES`` names it; on none if it is empty."""
    return replace(job, env={**job.env, "CUDA_VISIBLE_DEVICES": gpu})


class Handle(ABC):
    """A job that was handed over."""

    @abstractmethod
    def poll(self) -> int | None:
        """Its exit code; None while it waits or runs."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to end, with a checkpoint; ``poll`` tells when it has."""


class Executor(ABC):
    """Runs jobs; a context manager."""

    def __init__(self, section: ExecutorSection) -> None:
        self.section = section

    @property
    @abstractmethod
    def slots(self) -> int:
        """Jobs at a time."""

    @abstractmethod
    def submit(self, job: Job) -> Handle:
        """Start a job, or queue it where the cluster is busy."""

    def find(self, job: Job) -> Handle | None:
        """The same job as an earlier executor submitted it, if it still waits or runs and can be
        found. (A run that holds its folder is found by that.)"""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Let go of the cluster."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


EXECUTORS: Registry[type[Executor]] = Registry("executor")


def build_executor(section: ExecutorSection) -> Executor:
    """The executor of a kind. Raises ``ConfigError`` for an unknown one, or one whose package is
    not installed."""
    package = "factorlm.scaling.ladder.executors"
    folder = os.path.dirname(__file__)
    kinds = [m.name for m in pkgutil.iter_modules([folder]) if m.name != "base"]
    check(
        section.kind in kinds,
        f"executor.kind={section.kind!r} must be one of {', '.join(kinds)}."
        f"{did_you_mean(section.kind, kinds)}",
    )
    importlib.import_module(f"{package}.{section.kind}")
    return EXECUTORS[section.kind](section)


def start(job: Job) -> subprocess.Popen[bytes]:
    """The job's process, in a session of its own: Ctrl-C is for the queue, which then stops it."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=job.folder,
            env=os.environ | job.env,
            start_new_session=True,
        )


def run_job(job: Job) -> int:
    """Run a job to its end, on whatever machine this is called; its exit code.

    It is asked to end when its stop file appears, or when this process is: a cluster may deliver
    neither signal nor message, but all machines see the same folders.
    """
    if job.stop_file.exists():
        return INTERRUPTED
    child = start(job)
    try:
        while child.poll() is None:
            if job.stop_file.exists():
                child.send_signal(signal.SIGTERM)
                return child.wait()
            time.sleep(POLL_SECONDS)
        return child.returncode
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise

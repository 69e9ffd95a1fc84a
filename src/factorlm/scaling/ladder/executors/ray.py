"""Tasks of a Ray cluster, whose machines share the folders of runs and data."""

from __future__ import annotations

import logging
from typing import Any

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import ExecutorSection
from factorlm.scaling.ladder.executors.base import EXECUTORS, Executor, Handle, Job, on_gpu, run_job


class Task(Handle):
    """A task that waits for its process."""

    def __init__(self, ray: Any, reference: Any, job: Job) -> None:
        self.ray = ray
        self.reference = reference
        self.job = job

    def poll(self) -> int | None:
        """The exit code of the process; 1 if the task itself was lost."""
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return int(self.ray.get(self.reference))
        except self.ray.exceptions.RayError as error:
            with self.job.log.open("a") as log:
                log.write(f"\n{error}\n")
            return 1

    def stop(self) -> None:
        """By the stop file, which the task looks for; one that has not begun ends at once."""
        self.job.stop_file.touch()


@EXECUTORS.register("ray")
class RayExecutor(Executor):
    """Joins the cluster of ``options`` (arguments of ``ray.init``), or starts one here."""

    def __init__(self, section: ExecutorSection) -> None:
        super().__init__(section)
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "executor.kind='ray' needs Ray: pip install 'factorlm[cluster]'"
            ) from None
        self.ray = ray
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        quiet["logging_level"] = logging.WARNING
        if "address" in section.options:
            del quiet["include_dashboard"]  # only for a cluster that is started here
        try:
            ray.init(**(quiet | section.options))
        except (TypeError, ValueError, ConnectionError, RuntimeError) as error:
            raise ConfigError(f"executor.options={section.options}: {error}") from None
        self.task = ray.remote(run_job)

        there = ray.cluster_resources()
        self.gpus = int(there.get("GPU", 0) > 0) if section.gpus is None else section.gpus
        if self._room() < 1:
            self.close()
            raise ConfigError(
                f"executor.threads={section.threads}, gpus={self.gpus}: the Ray cluster has "
                f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
            )

    @property
    def slots(self) -> int:
        """``workers``; without it what the cluster has room for now, and at least one."""
        return self.section.workers or max(1, self._room())

    def _room(self) -> int:
        there = self.ray.cluster_resources()
        room = int(there.get("CPU", 0)) // self.section.threads
        return min(room, int(there.get("GPU", 0))) if self.gpus else room

    def submit(self, job: Job) -> Task:
        """A task with the CPUs and GPU of one run; Ray itself does not try it again."""
        options = {"num_cpus": self.section.threads, "num_gpus": self.gpus}
        remote = self.task.options(**options, max_retries=0, name=job.name)
        job = job if self.gpus else on_gpu(job, "")
        return Task(self.ray, remote.remote(job), job)

    def close(self) -> None:
        """Leave the cluster, or end the one that was started here."""
        self.ray.shutdown()

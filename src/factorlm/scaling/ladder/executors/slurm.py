"""Jobs of a Slurm cluster, by submitit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import ExecutorSection
from factorlm.scaling.ladder.executors.base import (
    EXECUTORS,
    INTERRUPTED,
    Executor,
    Handle,
    Job,
    on_gpu,
    run_job,
)

DEFAULT_WORKERS = 16


class SlurmJob(Handle):
    """A job that waits for its process."""

    def __init__(self, submitted: Any, job: Job, errors: type[Exception]) -> None:
        self.submitted = submitted
        self.job = job
        self.errors = errors
        self.is_stopping = False

    def poll(self) -> int | None:
        """The exit code of the process; 1 if the job itself was lost or cancelled."""
        if not self.submitted.done():
            return INTERRUPTED if self.is_stopping and self._cancelled() else None
        try:
            return int(self.submitted.result())
        except self.errors as error:
            with self.job.log.open("a") as log:
                log.write(f"\n{error}\n")
            return 1

    def stop(self) -> None:
        """By the stop file; what still waits in Slurm's queue is cancelled by the next ``poll``."""
        self.job.stop_file.touch()
        self.is_stopping = True

    def _cancelled(self) -> bool:
        """Whether it waits no more in Slurm's queue; what runs is left to the stop file."""
        modes = ("standard", "force")  # Slurm is asked anew only if it did wait when last seen
        if any(self.submitted.get_info(mode=mode).get("State") != "PENDING" for mode in modes):
            return False
        try:
            self.submitted.cancel()
        except subprocess.CalledProcessError:
            return False
        return True


@EXECUTORS.register("slurm")
class SlurmExecutor(Executor):
    """A job a run. ``options`` go to submitit's ``update_parameters``, but ``cluster``: ``local``
    there runs jobs as processes of this machine, to try a ladder out."""

    def __init__(self, section: ExecutorSection) -> None:
        super().__init__(section)
        try:
            import submitit
        except ImportError:
            raise ConfigError(
                "executor.kind='slurm' needs submitit: pip install 'factorlm[cluster]'"
            ) from None
        self.submitit = submitit

    @property
    def slots(self) -> int:
        """``workers``, or 16: jobs that are in Slurm's queue at a time."""
        return self.section.workers or DEFAULT_WORKERS

    def submit(self, job: Job) -> SlurmJob:
        """Submit it with the CPUs and GPU of one run."""
        options = {"timeout_min": 24 * 60} | self.section.options
        cluster = options.pop("cluster", "slurm")
        parameters = {"name": job.name, "tasks_per_node": 1, "nodes": 1}
        if self.section.gpus is not None:
            parameters["gpus_per_node"] = self.section.gpus
        if cluster == "slurm":
            parameters["cpus_per_task"] = self.section.threads
        try:
            executor = self.submitit.AutoExecutor(folder=_folder(job), cluster=cluster)
            executor.update_parameters(**(parameters | options))
        except (RuntimeError, TypeError, ValueError, NameError) as error:
            raise ConfigError(f"executor.options={self.section.options}: {error}") from None
        job = on_gpu(job, "") if self.section.gpus == 0 else job
        submitted = executor.submit(run_job, job)
        if cluster == "slurm":
            _note(job).write_text(f"{submitted.job_id}\n")
        return self._handle(submitted, job)

    def find(self, job: Job) -> SlurmJob | None:
        """By the id beside the job's log, if Slurm says that it waits or runs."""
        if not _note(job).exists():
            return None
        job_id = _note(job).read_text().strip()
        submitted = self.submitit.SlurmJob(folder=_folder(job), job_id=job_id)
        if submitted.done(force_check=True) or submitted.state == "UNKNOWN":
            return None
        return self._handle(submitted, job)

    def _handle(self, submitted: Any, job: Job) -> SlurmJob:
        return SlurmJob(submitted, job, self.submitit.core.utils.UncompletedJobError)


def _folder(job: Job) -> Path:
    return job.log.parent / "slurm" / "%j"


def _note(job: Job) -> Path:
    """Has the id of the job that was submitted last."""
    return job.log.with_suffix(".slurm")

"""Processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess

import torch

from factorlm.config import check
from factorlm.measure.hardware import num_cpu_cores
from factorlm.scaling.ladder.config import ExecutorSection
from factorlm.scaling.ladder.executors.base import EXECUTORS, Executor, Handle, Job, on_gpu, start


class Process(Handle):
    """A child of the queue."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child

    def poll(self) -> int | None:
        """Its exit code."""
        return self.child.poll()

    def stop(self) -> None:
        """A training process saves a checkpoint on this."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)


@EXECUTORS.register("local")
class LocalExecutor(Executor):
    """One process a run: one a GPU where there are any, else as many as cores have room for."""

    def __init__(self, section: ExecutorSection) -> None:
        super().__init__(section)
        options = section.options
        check(not options, f"executor.options={options}: 'local' takes none")
        self.devices = [] if section.gpus == 0 else _devices()
        check(
            section.gpus != 1 or bool(self.devices),
            f"executor.gpus={section.gpus}: this machine has no CUDA device",
        )
        self.running: dict[str, Process] = {}

    @property
    def slots(self) -> int:
        """``workers``, at most one a GPU; without it what cores or GPUs have room for."""
        if self.devices:
            return min(self.section.workers or len(self.devices), len(self.devices))
        return self.section.workers or max(1, num_cpu_cores() // self.section.threads)

    def submit(self, job: Job) -> Process:
        """Start it, on a GPU of its own or on none."""
        if not self.devices:
            return Process(start(on_gpu(job, "")))
        busy = {gpu for gpu, process in self.running.items() if process.poll() is None}
        gpu = next(gpu for gpu in self.devices if gpu not in busy)
        self.running[gpu] = Process(start(on_gpu(job, gpu)))
        return self.running[gpu]


def _devices() -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` names those that are there."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]

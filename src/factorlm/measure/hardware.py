"""The environment of a measurement: versions, processor, threads, commit."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from factorlm.memory import keeps_freed_memory

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_PACKAGE = Path(__file__).parents[1]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the numbers of this process depend on, as JSON types, for a ``RunRecord``.

    ``commit`` is that of the source tree factorlm runs from, with ``-dirty`` where files differ
    from it, and None for an installed package. ``num_processes`` is ``torchrun``'s world size.
    """
    device = torch.device(device)
    return {
        "factorlm": importlib.metadata.version("factorlm"),
        "commit": source_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cpu_cores": num_cpu_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "keeps_freed_memory": keeps_freed_memory(),
        "num_threads": torch.get_num_threads(),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it, its architecture where it gives none."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def num_cpu_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def free_memory_bytes(device: torch.device | str = "cpu") -> int:
    """What can be allocated on ``device`` now, as the driver or the system says."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return 1024 * int(value.split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def source_commit(package: Path = _PACKAGE) -> str | None:
    """The commit of the git tree that ``package`` is a tracked part of, or None."""
    # An environment inside somebody's repository is not tracked there.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git in ``folder``, None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""Freed memory that is kept is not asked of the system again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from factorlm.measure import environment

NEW_TENSORS = 16 * 64 * 2**20 // 4096
"""What sixteen new tensors of 64 MiB cost in pages of 4 KiB."""

PROGRAM = """
import resource, sys
import torch
from factorlm.memory import keep_freed_memory, keeps_freed_memory
done = sys.argv[1] == "keep" and keep_freed_memory()
assert keeps_freed_memory() == done
# The first few widen the heap: an aligned block needs a little more than one leaves.
for _ in range(8):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(2**24)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return done[0] == "True", int(done[1])


@pytest.mark.parametrize("mode", ["keep", "leave"])
def test_kept_memory_costs_no_page_faults(mode: str) -> None:
    kept, faults = page_faults(mode)
    on_glibc = platform.libc_ver()[0] == "glibc"
    assert kept == (mode == "keep" and on_glibc)
    if kept:
        # Where the heap begins is drawn anew, so it may still widen by a tensor or two.
        assert faults < NEW_TENSORS / 4
    elif on_glibc and platform.machine() == "x86_64":
        assert faults > NEW_TENSORS / 2  # else there is nothing to win


def test_records_say_whether_memory_is_kept() -> None:
    assert isinstance(environment()["keeps_freed_memory"], bool)

"""Faults for tests: a crash at any file operation, a flipped bit, a file cut short."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from factorlm.storage import fileops


class SimulatedCrash(BaseException):
    """The process is gone: nothing after this may touch the disk."""


@contextlib.contextmanager
def crash_at(operation: int | None = None) -> Iterator[list[tuple[str, str]]]:
    """Count the file operations of ``factorlm.storage``; crash at the given one (1-based).

    Yields the list of operations done so far, each ``(name, file name)``. At the chosen one, and at
    every later one (clean-up code must not run on a dead machine), ``SimulatedCrash`` is raised; a
    write gets half of its bytes onto the disk first.
    """
    trace: list[tuple[str, str]] = []
    with contextlib.ExitStack() as patches:
        for name, function in inspect.getmembers(fileops, inspect.isfunction):
            wrapped = _counting(name, function, trace, operation)
            patches.enter_context(mock.patch.object(fileops, name, wrapped))
        yield trace


def flip_bit(path: str | os.PathLike[str], bit: int) -> None:
    """Flip one bit of a file, counted from its beginning."""
    data = bytearray(Path(path).read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    Path(path).write_bytes(data)


def _counting(
    name: str, function: Callable[..., Any], trace: list[tuple[str, str]], limit: int | None
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(target: Any, *args: Any) -> Any:
        if limit is not None and len(trace) + 1 >= limit:
            if name == "write" and len(trace) + 1 == limit:
                function(target, memoryview(args[0]).cast("B")[: len(args[0]) // 2])
            trace.append((name, _file_name(target)))
            raise SimulatedCrash(f"{name} {target}")
        trace.append((name, _file_name(target)))
        return function(target, *args)

    return wrapper


def _file_name(target: Any) -> str:
    return Path(target if isinstance(target, str | os.PathLike) else target.name).name

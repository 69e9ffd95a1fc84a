"""Run a function in several gloo processes on one machine, as ``torchrun`` would on many."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def run_distributed(
    fn: Callable[..., T], world_size: int = 2, *args: Any, timeout_s: float = 120.0
) -> list[T]:
    """Call ``fn(*args)`` in ``world_size`` processes and return what each rank returned.

    Each process has one thread, a gloo process group over a temporary file, and the environment
    variables RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. ``fn`` is a function at the top
    level of a module; arguments and results travel by pickle.

    The first error of any rank is raised here with that rank's traceback as a note, and the other
    processes are ended. Raises ``RuntimeError`` for a rank that died without a word and
    ``TimeoutError`` after ``timeout_s`` seconds.
    """
    context = multiprocessing.get_context("spawn")
    job = pickle.dumps((_module_files(fn, *args), pickle.dumps((fn, args))))
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (rank, world_size, rendezvous, timeout_s, job, sender)
                process: BaseProcess = context.Process(target=_rank_main, args=arguments)
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            return _collect(pipes, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _module_files(*objects: Any) -> dict[str, str | None]:
    """Name and file of the modules that define ``objects``: a test module has no import path."""
    kinds = [item if callable(item) else type(item) for item in objects]
    names = {kind.__module__ for kind in kinds} - {"builtins"}
    return {name: sys.modules[name].__file__ for name in names}


def _collect(pipes: list[Connection], processes: list[BaseProcess], timeout_s: float) -> list[Any]:
    """Each rank's result; raises at the first error."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"ranks {missing} gave no result in timeout_s={timeout_s}")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            results[rank] = _receive(rank, pipes[rank], processes[rank])
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Connection, process: BaseProcess) -> Any:
    try:
        result, error, trace = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
    if error is not None:
        error.add_note(f"In rank {rank}:\n{trace}")
        raise error
    return result


def _rank_main(
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
    job: bytes,
    sender: Connection,
) -> None:
    """What a process does: join the group, call, send back (result, error, traceback)."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        message = pickle.dumps((_call(job), None, ""))
    except BaseException as error:
        message = _error_message(error)
    # Pickled by value: torch's own pickling for processes hands out memory that dies with us.
    sender.send_bytes(message)
    if dist.is_initialized():
        dist.destroy_process_group()


def _call(job: bytes) -> Any:
    files, call = pickle.loads(job)
    for name, path in files.items():
        _import(name, path)
    fn, args = pickle.loads(call)
    return fn(*args)


def _import(name: str, path: str | None) -> None:
    """Import module ``name``, from its file where the import path does not lead to it."""
    try:
        importlib.import_module(name)
    except ImportError:
        if path is None:
            raise
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        for end in (end for end, letter in enumerate(name) if letter == "."):
            sys.modules.setdefault(name[:end], ModuleType(name[:end]))  # pickle looks for it
        spec.loader.exec_module(module)


def _error_message(error: BaseException) -> bytes:
    """The error itself where it can travel, otherwise a RuntimeError of its text."""
    trace = "".join(traceback.format_exception(error))
    try:
        message = pickle.dumps((None, error, trace))
        pickle.loads(message)
    except Exception:
        substitute = RuntimeError(f"{type(error).__name__}: {error}")
        message = pickle.dumps((None, substitute, trace))
    return message

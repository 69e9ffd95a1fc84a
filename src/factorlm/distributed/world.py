"""One object that knows rank, size and device, and the few collectives that a run needs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from factorlm.config import check
from factorlm.errors import PeerLostError

SETTLE_SECONDS = 0.25


@dataclass(frozen=True)
class World:
    """The processes that ``torchrun`` started, or this one alone."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto", timeout_seconds: float = 120.0) -> World:
        """Join the process group that ``torchrun``'s variables name; without them, be alone.

        ``timeout_seconds`` is how long a collective waits for its peers.
        """
        has_cuda = torch.cuda.is_available()
        kind = ("cuda" if has_cuda else "cpu") if device == "auto" else device
        check(kind == "cpu" or has_cuda, f"parallel.device={device!r}: no CUDA device was found")
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        target = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) if kind == "cuda" else 0)
        if kind == "cuda":
            torch.cuda.set_device(target)
        else:
            target = torch.device("cpu")
        if size > 1 and not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_seconds),
            )
        return cls(rank, size, target)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Add ``values`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """The value that the main process holds, on every process (plain Python objects)."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def stop(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            # gloo's threads need the interpreter's lock to let go of the last tensors, and the
            # group's destructor waits for them while it holds that lock: let them finish first.
            time.sleep(SETTLE_SECONDS)
            dist.destroy_process_group()


_LOST = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "gloo")


@contextmanager
def peers_watched(world: World) -> Iterator[None]:
    """Turn a failed collective into ``PeerLostError``."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        failed = isinstance(error, dist.DistError) or any(word in text for word in _LOST)
        if world.size > 1 and failed:
            raise PeerLostError(f"rank {world.rank} lost a peer: {error}") from error
        raise

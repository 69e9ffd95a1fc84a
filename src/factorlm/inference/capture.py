"""A function as a CUDA graph: many kernels in one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import final

import torch
from torch import Tensor

from factorlm.layers.copies import HeldCopies, holding_copies

NUM_WARM_UPS = 3
"""Runs before the capture, in which libraries allocate what they need (PyTorch's own advice)."""


@final
class CapturedStep:
    """A call replays the graph and returns the same tensor every time.

    The graph reads weights where they lay in the capture. Where a layer of ``premerge_`` took its
    merged copy, the graph reads that copy, and this holds it.
    """

    def __init__(self, replay: Callable[[], Tensor], copies: HeldCopies) -> None:
        self._replay = replay
        self._copies = copies

    def __call__(self) -> Tensor:
        """Replay it on the current stream."""
        return self._replay()

    def is_kept(self) -> bool:
        """Whether no layer dropped a copy that the graph reads. Cheap: to be asked every time."""
        return self._copies.are_kept()

    def is_current(self) -> bool:
        """Whether all copies that the graph reads are those of the layers' weights as they are."""
        return self._copies.are_current()


def capture(step: Callable[[], Tensor], device: torch.device | None = None) -> CapturedStep:
    """Capture ``step``, which works on ``device`` (None: the current one), as a CUDA graph.

    The runs before it choose as the captured one does: they make the merged copies that it reads,
    and compare the kernels that it takes (``factorlm.ops.low_rank``). Threads may capture at the
    same time, one waits for the other.
    """
    with holding_copies() as copies:
        replay = record(step, device)
    return CapturedStep(replay, copies)


def record(step: Callable[[], Tensor], device: torch.device | None) -> Callable[[], Tensor]:
    """All that ``capture`` needs a GPU for: a function that replays ``step``.

    A stream of its own, on that device: the one that ``torch.cuda.graph`` would take is made once
    for all devices. What is unsafe in a capture (to allocate memory of CUDA, say) is forbidden to
    this thread alone: others go on, and PyTorch gives them memory from outside of the graph's.
    """
    with _CAPTURING, torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            output = step()
    return partial(_replay, graph, output, step)


def _replay(graph: torch.cuda.CUDAGraph, output: Tensor, step: object) -> Tensor:
    """``step`` is only held: the graph reads what it refers to, where that lay in the capture."""
    graph.replay()
    return output


_CAPTURING = threading.Lock()
"""PyTorch takes one capture at a time."""

"""What is asked of CUDA for a capture, with a CUDA that only notes it; ``tests/gpu`` has the real
one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from factorlm.inference.capture import NUM_WARM_UPS, capture

DEVICE = torch.device("cuda", 1)


class FakeCUDA:
    """Device 0 is current. A stream is where it was made and its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[object] = []
        self.captures = 0
        self.thread = threading.local()
        self.num_streams = 0
        cuda = self

        class Stream:
            def __init__(self) -> None:
                cuda.num_streams += 1
                self.name = (cuda.device_index, cuda.num_streams)

            def wait_stream(self, other: object) -> None:
                cuda.events.append(("wait", cuda.device_index))

        class CUDAGraph:
            def replay(self) -> None:
                cuda.events.append("replay")

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "current_stream": Stream,
            "device": self.device,
            "stream": self.stream,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @property
    def device_index(self) -> int:
        return getattr(self.thread, "device", 0)

    @contextmanager
    def device(self, device: torch.device | None) -> Iterator[None]:
        before = self.device_index
        self.thread.device = before if device is None else device.index
        try:
            yield
        finally:
            self.thread.device = before

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.thread.stream = stream.name  # type: ignore[attr-defined]
        yield
        self.thread.stream = None

    @contextmanager
    def graph(self, graph: object, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.captures += 1
        assert self.captures == 1, "PyTorch takes one capture at a time"
        self.events.append(capture_error_mode)
        with self.stream(stream):
            yield
        self.captures -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCUDA:
    return FakeCUDA(monkeypatch)


def noted(cuda: FakeCUDA) -> Callable[[], Tensor]:
    output = torch.zeros(1)

    def step() -> Tensor:
        cuda.events.append(("step", cuda.device_index, cuda.thread.stream))
        return output

    return step


def test_all_runs_are_on_one_stream_of_the_models_device(cuda: FakeCUDA) -> None:
    replay = capture(noted(cuda), DEVICE)
    run = ("step", 1, (1, 1))
    assert cuda.events == [
        ("wait", 1),
        *[run] * NUM_WARM_UPS,
        ("wait", 1),
        "thread_local",
        run,
    ]
    assert cuda.device_index == 0
    cuda.events.clear()
    assert replay() is replay()
    assert cuda.events == ["replay", "replay"]


def test_without_a_device_it_is_the_current_one(cuda: FakeCUDA) -> None:
    capture(noted(cuda))
    assert ("step", 0, (0, 1)) in cuda.events


def test_threads_capture_one_after_the_other(cuda: FakeCUDA) -> None:
    """All runs of one, before any of the next."""
    start = threading.Barrier(4)
    runs: list[int] = []

    def body(number: int) -> None:
        def step() -> Tensor:
            runs.append(number)
            time.sleep(1e-3)  # so that others come between, if they may
            return torch.zeros(1)

        start.wait()
        capture(step, DEVICE)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(body, range(4)))
    each = NUM_WARM_UPS + 1
    assert len(runs) == 4 * each
    assert all(len(set(runs[at : at + each])) == 1 for at in range(0, len(runs), each))


def test_a_capture_that_fails_lets_others_go_on(cuda: FakeCUDA) -> None:
    def fails() -> Tensor:
        raise RuntimeError("not in a graph")

    with pytest.raises(RuntimeError, match="not in a graph"):
        capture(fails, DEVICE)
    capture(noted(cuda), DEVICE)

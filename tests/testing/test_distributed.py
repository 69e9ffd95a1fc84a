"""run_distributed: results by rank, errors with their traceback, deaths, timeouts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from factorlm.errors import ConfigError
from factorlm.testing import run_distributed

pytestmark = pytest.mark.slow


@dataclass
class Payload:
    """A class of a test module, which has no import path."""

    value: int


class UnpicklableError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def report(payload: Payload, tensor: torch.Tensor) -> tuple[int, str, int, torch.Tensor]:
    total = tensor * (dist.get_rank() + payload.value)
    dist.all_reduce(total)
    return dist.get_rank(), os.environ["LOCAL_WORLD_SIZE"], torch.get_num_threads(), total


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ConfigError("rank=300 exceeds 256")
    dist.barrier()


def raise_unpicklable() -> None:
    raise UnpicklableError(3, 4)


def die() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    time.sleep(60)


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_back_by_rank() -> None:
    results = run_distributed(report, 3, Payload(10), torch.tensor([1.0, 2.0]))
    assert [(rank, size, threads) for rank, size, threads, _ in results] == [
        (rank, "3", 1) for rank in range(3)
    ]
    for *_, total in results:
        assert total.tolist() == [33.0, 66.0]


def test_an_error_keeps_its_type_and_traceback() -> None:
    with pytest.raises(ConfigError, match="rank=300") as caught:
        run_distributed(fail_on_rank_one)
    (note,) = caught.value.__notes__
    assert "In rank 1" in note
    assert "in fail_on_rank_one" in note


def test_an_error_that_cannot_travel_keeps_its_text() -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: 3 and 4") as caught:
        run_distributed(raise_unpicklable)
    assert "in raise_unpicklable" in caught.value.__notes__[0]


def test_a_death_is_reported_and_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_distributed(die)


def test_a_hang_times_out() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] gave no result in timeout_s=15"):
        run_distributed(hang, timeout_s=15)

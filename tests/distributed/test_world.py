"""The process group: alone, in pairs, and when a peer goes away."""

from __future__ import annotations

import pytest
import torch

from factorlm.distributed import World, peers_watched
from factorlm.errors import ConfigError, PeerLostError
from factorlm.testing import run_distributed


def test_alone_nothing_is_exchanged() -> None:
    world = World.start("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    values = torch.tensor([1.0, 2.0])
    assert world.sum_(values) is values
    assert world.from_main({"a": 1}) == {"a": 1}
    world.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.device='cuda'"):
        World.start("cuda")


def exchanged() -> tuple[list[float], str]:
    world = World.start("cpu")
    total = world.sum_(torch.tensor([1.0, float(world.rank)])).tolist()
    return total, world.from_main(f"rank {world.rank}")


@pytest.mark.slow
def test_two_processes_agree() -> None:
    assert run_distributed(exchanged) == [([2.0, 1.0], "rank 0")] * 2


def test_a_failed_collective_is_a_lost_peer_and_other_errors_stay_what_they_are() -> None:
    pair = World(0, 2, torch.device("cpu"))
    with pytest.raises(PeerLostError, match="rank 0 lost a peer"), peers_watched(pair):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match="a shape is wrong"), peers_watched(pair):
        raise RuntimeError("a shape is wrong")

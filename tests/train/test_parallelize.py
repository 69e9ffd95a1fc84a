"""One process, DDP and FSDP2: the same initial weights, the same losses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from factorlm.errors import InterruptedRun
from factorlm.records import RecordFile, StepRecord
from factorlm.testing import run_distributed
from factorlm.train import TrainConfig
from factorlm.train.trainer import Trainer

STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "low_rank": {"structure": "low_rank", "rank": 8},
    "block_shuffle": {"structure": "block_shuffle", "num_blocks": 4},
    "block_dense": {"structure": "block_dense", "num_blocks": 2, "rank": 16},
}


class Watched(Trainer):
    """Notes every initial weight, whole, and where the dimensions of 3-D parameters are cut."""

    def _build(self) -> None:
        super()._build()
        self.initial: dict[str, bytes] = {}
        self.cut: set[str] = set()
        for name, parameter in self.model.named_parameters():
            whole = parameter
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor()
                if parameter.ndim == 3:
                    self.cut.add(str(parameter.placements[0]))
                    # What all ranks send is the factor itself, without padding.
                    assert self.world.size * parameter.to_local().numel() == parameter.numel()
            self.initial[name] = whole.detach().numpy().tobytes()


def fit(values: dict[str, Any], runs: str) -> tuple[list[float], dict[str, bytes], set[str]]:
    trainer = Watched(TrainConfig.from_dict(values), runs_dir=runs)
    trainer.fit()
    records = RecordFile(trainer.run.records.path)
    losses = [record.loss for record in records if isinstance(record, StepRecord)]
    return losses, trainer.initial, trainer.cut


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(
    tiny_values: Callable[..., dict[str, Any]], tmp_path: Path, name: str, strategy: str
) -> None:
    values = tiny_values(
        structure=STRUCTURES[name], batch={"num_sequences": 8, "micro_batch": 2, "num_steps": 10}
    )
    wanted, initial, _ = fit(values, str(tmp_path / "one"))
    values["parallel"]["strategy"] = strategy
    results = run_distributed(fit, 2, values, str(tmp_path / "two"))
    for found, weights, cut in results:
        assert weights == initial
        assert found == pytest.approx(wanted, rel=1e-6, abs=0)
        blocks = name.startswith("block") and strategy == "fsdp2"
        assert cut == ({"S(1)"} if blocks else set())
    one = load_file(tmp_path / "one" / "tiny" / "model" / "model.safetensors")
    two = load_file(tmp_path / "two" / "tiny" / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


class StopAfterFour(Trainer):
    """Gets a signal in its fourth step, on one rank or on all."""

    ranks = (0, 1)

    def _step(self) -> None:
        super()._step()
        if self.state.step == 4 and self.world.rank in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)


class StopOnRankOne(StopAfterFour):
    ranks = (1,)


def stop(values: dict[str, Any], runs: str) -> int:
    """The step of the checkpoint that the stopped run left."""
    with pytest.raises(InterruptedRun):
        StopOnRankOne(TrainConfig.from_dict(values), runs_dir=runs).fit()
    return max(int(path.name[5:]) for path in Path(runs, "tiny", "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_on_one_process_stops_both_and_the_run_goes_on_exactly(
    tiny_values: Callable[..., dict[str, Any]], tmp_path: Path, strategy: str
) -> None:
    values = tiny_values(parallel={"strategy": strategy})
    wanted = run_distributed(fit, 2, values, str(tmp_path / "whole"))[0][0]
    assert run_distributed(stop, 2, values, str(tmp_path / "cut")) == [5, 5]
    found = [losses for losses, _, _ in run_distributed(fit, 2, values, str(tmp_path / "cut"))]
    assert found == [wanted, wanted]


@pytest.mark.slow
def test_a_sharded_checkpoint_of_two_processes_goes_on_in_one(
    tiny_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = tiny_values(parallel={"strategy": "fsdp2"})
    wanted = run_distributed(fit, 2, values, str(tmp_path / "whole"))[0][0]
    run_distributed(stop, 2, values, str(tmp_path / "cut"))
    values["parallel"]["strategy"] = "auto"
    with pytest.warns(UserWarning, match="world_size 2 -> 1"):
        found, _, _ = fit(values, str(tmp_path / "cut"))
    assert found[:5] == wanted[:5]
    assert found == pytest.approx(wanted, rel=1e-6, abs=0)

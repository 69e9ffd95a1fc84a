"""Self-guided runs of two processes: what is counted, how they begin, and how they resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from factorlm.distributed import World
from factorlm.errors import ConfigError, InterruptedRun
from factorlm.records import RecordFile, StepRecord
from factorlm.surgery import guided_layers
from factorlm.testing import run_distributed
from factorlm.train import TrainConfig, assemble, parallelize
from factorlm.train.describe import describe
from factorlm.train.trainer import Trainer

MakeValues = Callable[..., dict[str, Any]]
BUDGET = {"flops": "dense", "count": "executed_flops"}


def guide(**fields: Any) -> dict[str, Any]:
    return {"variant": "full", "share": 0.5} | fields


class FlopsCounted(Trainer):
    """Counts the matmuls of every step's passes on this process."""

    def _backward(self, step: int) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            loss = super()._backward(step)
        self.flops = [*getattr(self, "flops", []), counter.get_total_flops()]
        return loss


def flops_of_a_guide(values: dict[str, Any], runs: str) -> tuple[int, int]:
    """What the guided first step of two took more than the other one, on this process; and what
    the plan says of all processes."""
    trainer = FlopsCounted(TrainConfig.from_dict(values), runs_dir=runs)
    trainer.fit()
    assert trainer.plan.guided_step is not None
    return trainer.flops[0] - trainer.flops[1], trainer.plan.guided_step.executed_flops


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_sequences"), [("ddp", 2), ("ddp", 8), ("fsdp2", 8)])
def test_a_guide_is_counted_as_two_processes_run_it(
    tiny_values: MakeValues, tmp_path: Path, strategy: str, num_sequences: int
) -> None:
    """Merging pays from 22 tokens a pass on: not for one sequence of 16, but for two; and each
    process merges."""
    values = tiny_values(
        guide=guide(),
        batch={"num_sequences": num_sequences, "num_steps": 2},
        parallel={"strategy": strategy},
    )
    found = run_distributed(flops_of_a_guide, 2, values, str(tmp_path))
    assert sum(own for own, _ in found) == found[0][1] == found[1][1]


def test_the_number_of_processes_changes_no_step(tiny_values: MakeValues) -> None:
    """A run may be resumed on another number of them."""
    values = tiny_values(guide=guide(share=None), budget=BUDGET, batch={"num_steps": 200})
    config = TrainConfig.from_dict(values)
    one, eight = (describe(config, num_processes=number).plan for number in (1, 8))
    assert (one.num_steps, one.guide) == (eight.num_steps, eight.guide)
    assert one.guided_step != eight.guided_step
    with pytest.raises(ConfigError, match="num_sequences=8 must be a multiple of the 3 processes"):
        describe(config, num_processes=3)


def unlike_guides(values: dict[str, Any]) -> list[torch.Tensor]:
    """The guides of a process whose CPU rounds in its own way, once it is one of two."""

    def build_model(*args: Any, **kwargs: Any) -> Any:
        model, report = assemble.build_model(*args, **kwargs)
        for layer in guided_layers(model).values():
            layer.guide.weight.data *= 1 + 1e-6 * world.rank
        return model, report

    world = World.start("cpu")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallelize, "build_model", build_model)
            config = TrainConfig.from_dict(values)
            model = parallelize.parallelize_model(config, world, guided=True).model
        return [layer.guide.weight.detach() for layer in guided_layers(model).values()]
    finally:
        world.stop()


@pytest.mark.slow
def test_replicas_begin_with_one_guide(tiny_values: MakeValues) -> None:
    mine, theirs = run_distributed(unlike_guides, 2, tiny_values(guide=guide()))
    assert mine
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


class Stopped(Trainer):
    """Gets a signal in its sixth step."""

    def _step(self) -> None:
        super()._step()
        if self.state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)


def losses(trainer: Trainer) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    trainer.fit()
    records = RecordFile(trainer.run.records.path)
    return [(r.loss, r.grad_norm) for r in records if isinstance(r, StepRecord)]


def whole_and_cut(recipes: list[dict[str, Any]], runs: str) -> list[Any]:
    """Of every recipe: the losses of a run at once, and of one that was stopped and resumed."""
    leave, found = World.stop, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "stop", lambda world: None)  # all runs in one process group
        for values in recipes:
            config = TrainConfig.from_dict(values)
            whole = losses(Trainer(config, runs_dir=f"{runs}/whole"))
            stopped = Stopped(config, runs_dir=f"{runs}/cut")
            with pytest.raises(InterruptedRun):
                stopped.fit()
            assert stopped.plan.guide is not None
            assert 6 < stopped.plan.guide.num_steps < stopped.plan.num_steps
            resumed = Trainer(config, runs_dir=f"{runs}/cut")
            found.append((whole, losses(resumed)))
            assert resumed.checkpoint is not None
    leave(resumed.world)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_resumed_amid_guidance_is_bit_equal(
    tiny_values: MakeValues, tmp_path: Path, strategy: str
) -> None:
    """With the optimizers that keep more than moments, on flat and on block factors."""
    structures = {
        "muon": {"structure": "low_rank", "rank": 8},
        "spectron": {"structure": "block_shuffle", "num_blocks": 4},
    }
    recipes = [
        tiny_values(
            name=kind,
            structure=structure,
            guide=guide(variant="stochastic", share=0.75),
            optimizer={"kind": kind},
            batch={"micro_batch": 2, "num_steps": 12},
            parallel={"strategy": strategy},
        )
        for kind, structure in structures.items()
    ]
    for found in run_distributed(whole_and_cut, 2, recipes, str(tmp_path)):
        for whole, cut in found:
            assert len(whole) == 12
            assert cut == whole
    for kind in structures:
        one, two = (
            load_file(tmp_path / folder / kind / "model" / "model.safetensors")
            for folder in ("whole", "cut")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())

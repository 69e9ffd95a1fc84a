"""Self-guided runs: α, skipped steps, the end of the guides, replay, resume, processes."""

from __future__ import annotations

import gc
import os
import signal
import warnings
import weakref
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from factorlm.errors import ConfigError, InterruptedRun
from factorlm.hf import load
from factorlm.optim import GuideSchedule
from factorlm.records import EvalRecord, RecordFile, RunRecord, StepRecord
from factorlm.surgery import guided_layers
from factorlm.testing import run_distributed
from factorlm.train import TrainConfig
from factorlm.train.describe import describe
from factorlm.train.trainer import Trainer

MakeValues = Callable[..., dict[str, Any]]
BUDGET = {"flops": "dense", "count": "executed_flops"}
STRUCTURES: dict[str, dict[str, Any]] = {
    "low_rank": {"structure": "low_rank", "rank": 8},
    "block_shuffle": {"structure": "block_shuffle", "num_blocks": 4},
    "block_dense": {"structure": "block_dense", "num_blocks": 2, "rank": 16},
}


class Watched(Trainer):
    """Notes what each step read and did to the guides, and stops where it is told to."""

    stop_at: int | None = None

    def _build(self) -> None:
        super()._build()
        self.read: list[int] = []
        self.guides: list[dict[str, torch.Tensor]] = []
        batch = self.loader.batch

        def noted(step: int) -> Any:
            self.read.append(step)
            return batch(step)

        self.loader.batch = noted  # type: ignore[method-assign]

    def _step(self) -> None:
        layers = guided_layers(self.model)
        found = {name: layer.guide.weight for name, layer in layers.items()}
        super()._step()
        moments = [self.optimizer.state.get(weight, {}) for weight in found.values()]
        self.guides.append(
            {name: weight.detach().clone() for name, weight in found.items()}
            | {f"{i}|{k}": v.clone() for i, m in enumerate(moments) for k, v in m.items()}
        )
        if self.state.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def run(values: dict[str, Any], runs: str, stop_at: int | None = None) -> Watched:
    trainer = Watched(TrainConfig.from_dict(values), runs_dir=runs)
    trainer.stop_at = stop_at
    trainer.fit()
    return trainer


def steps(trainer: Trainer) -> list[StepRecord]:
    return [r for r in RecordFile(trainer.run.records.path) if isinstance(r, StepRecord)]


def final(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(runs / "tiny" / "model" / "model.safetensors")


def guide(**fields: Any) -> dict[str, Any]:
    return {"variant": "stochastic", "share": 0.6} | fields


def test_alpha_and_choices_follow_the_schedule(tiny_values: MakeValues, tmp_path: Path) -> None:
    trainer = run(tiny_values(guide=guide(), batch={"num_steps": 20}), str(tmp_path))
    schedule = GuideSchedule(num_steps=12, variant="stochastic", seed=0)
    records = steps(trainer)
    for step, record in enumerate(records):
        guided = step < 12
        assert record.guide_alpha == (schedule.alpha_at(step) if guided else None)
        assert record.guide_skipped == (guided and not schedule.is_guided(step))
    assert 0 < sum(record.guide_skipped for record in records) < 11
    assert records[-1].executed_flops == trainer.plan.spent(20).executed_flops
    assert records[-1].model_flops == trainer.plan.spent(20).model_flops


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_step_leaves_the_guide_and_its_state(
    tiny_values: MakeValues, tmp_path: Path, name: str, kind: str
) -> None:
    values = tiny_values(
        structure=STRUCTURES[name],
        guide=guide(),
        batch={"num_steps": 20},
        optimizer={"kind": kind},
    )
    trainer = run(values, str(tmp_path))
    skipped = [record.guide_skipped for record in steps(trainer)][:11]
    for step in range(1, 11):
        before, after = trainer.guides[step - 1], trainer.guides[step]
        assert before.keys() == after.keys()
        same = [torch.equal(before[key], after[key]) for key in before]
        assert all(same) if skipped[step] else not any(same)


def test_the_saved_model_has_no_trace_of_the_guide(tiny_values: MakeValues, tmp_path: Path) -> None:
    plain = run(tiny_values(), str(tmp_path / "plain"))
    trainer = run(tiny_values(guide=guide()), str(tmp_path))
    assert final(tmp_path).keys() == final(tmp_path / "plain").keys()
    assert not guided_layers(trainer.model)
    mine, theirs = trainer.optimizer, plain.optimizer
    assert [g["names"] for g in mine.param_groups] == [g["names"] for g in theirs.param_groups]
    assert len(mine.state) == len(theirs.state)
    assert trainer.model.config.to_dict() == plain.model.config.to_dict()
    assert load(tmp_path / "tiny").num_parameters() == plain.model.num_parameters()
    checkpoint = load_file(tmp_path / "tiny" / "checkpoints" / "step-10" / "optimizer.safetensors")
    assert not [name for name in checkpoint if "guide" in name]


class Weak(Trainer):
    """Keeps weak references to the guides with their last gradients and moments."""

    weak: list[weakref.ref[torch.Tensor]]

    def _backward(self, step: int) -> torch.Tensor:
        loss = super()._backward(step)
        assert self.plan.guide is not None
        if step == self.plan.guide.num_steps - 1:
            weights = [layer.guide.weight for layer in guided_layers(self.model).values()]
            tensors = [t for w in weights for t in (w, w.grad, *self.optimizer.state[w].values())]
            self.weak = [weakref.ref(t) for t in tensors if t is not None and t.ndim == 2]
        return loss


def freed(values: dict[str, Any], runs: str) -> tuple[int, int]:
    """Tensors of guides that were watched, and how many are still in memory after the run."""
    trainer = Weak(TrainConfig.from_dict(values), runs_dir=runs)
    trainer.fit()
    gc.collect()
    return len(trainer.weak), sum(reference() is not None for reference in trainer.weak)


WATCHED = 2 * 4
"""Two guides, each with its weight, its gradient and AdamW's two moments."""


@pytest.mark.parametrize("name", STRUCTURES)
def test_memory_returns_to_that_of_the_structured_model(
    tiny_values: MakeValues, tmp_path: Path, name: str
) -> None:
    values = tiny_values(structure=STRUCTURES[name], guide=guide(variant="full"))
    assert freed(values, str(tmp_path)) == (WATCHED, 0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_memory_returns_in_two_processes(
    tiny_values: MakeValues, tmp_path: Path, strategy: str
) -> None:
    values = tiny_values(guide=guide(variant="full"), parallel={"strategy": strategy})
    assert run_distributed(freed, 2, values, str(tmp_path)) == [(WATCHED, 0)] * 2


def test_no_guided_model_is_saved_or_the_best(tiny_values: MakeValues, tmp_path: Path) -> None:
    values = tiny_values(guide=guide(), eval={"every_steps": 2})
    trainer = run(values, str(tmp_path))
    evals = [r for r in RecordFile(trainer.run.records.path) if isinstance(r, EvalRecord)]
    assert [(r.step, r.guided) for r in evals] == [
        (2, True),
        (4, True),
        (6, False),
        (8, False),
        (10, False),
    ]
    assert trainer.state.best_loss == min(r.loss for r in evals if not r.guided)


def test_a_guided_evaluation_mixes_by_alpha(tiny_values: MakeValues, tmp_path: Path) -> None:
    """Whatever branch the step before it took."""
    values = tiny_values(guide=guide(share=1.0), eval={"every_steps": 1}, batch={"num_steps": 8})
    seen = []

    class Spy(Watched):
        def _validation_loss(self, num_tokens: int | None) -> Any:
            layers = guided_layers(self.model).values()
            seen.append((self.state.step, [float(layer.alpha) for layer in layers]))
            return super()._validation_loss(num_tokens)

    Spy(TrainConfig.from_dict(values), runs_dir=str(tmp_path)).fit()
    schedule = GuideSchedule(num_steps=8)
    for step, alphas in seen[:-1]:
        assert alphas == pytest.approx([schedule.alpha_at(step)] * 2)
    assert seen[-1] == (8, [])


def test_fixed_flop_mode_replays_the_guided_tokens(tiny_values: MakeValues, tmp_path: Path) -> None:
    values = tiny_values(guide=guide(share=None), budget=BUDGET, batch={"num_steps": 40})
    trainer = run(values, str(tmp_path))
    guided = trainer.plan.guide.num_steps
    assert 0 < guided < 40
    assert trainer.read == [*range(40), *range(guided)]
    assert len(steps(trainer)) == 40 + guided
    dense = describe(TrainConfig.from_dict(tiny_values(structure={}, batch={"num_steps": 40})))
    one_step = trainer.plan.step.executed_flops + trainer.plan.guided_step.executed_flops
    spent = trainer.plan.total.executed_flops
    assert abs(spent - dense.training.executed_flops) <= one_step
    record = next(iter(RecordFile(trainer.run.records.path)))
    assert isinstance(record, RunRecord)
    assert record.executed_flops == spent
    assert record.num_original_steps == 40
    assert record.num_guide_steps == guided


def test_the_control_is_more_tokens_at_the_same_flops(
    tiny_values: MakeValues, tmp_path: Path
) -> None:
    values = tiny_values(guide={"variant": "none"}, budget=BUDGET, batch={"num_steps": 40})
    trainer = run(values, str(tmp_path))
    assert trainer.read == [*range(trainer.plan.num_steps)]
    assert trainer.plan.num_steps > 40
    step = trainer.plan.step.executed_flops
    dense = describe(TrainConfig.from_dict(tiny_values(structure={}, batch={"num_steps": 40})))
    assert 0 <= dense.training.executed_flops - trainer.plan.num_steps * step < step


def budget_for(values: dict[str, Any], num_guide_steps: float) -> float:
    """Model FLOPs with which so many steps are guided on average, and replayed."""
    guided = values["guide"] | {"share": 0.5}
    plan = describe(TrainConfig.from_dict(values | {"guide": guided, "budget": {}})).plan
    structured = plan.step.model_flops * (plan.num_original_steps + num_guide_steps)
    return structured + 0.5 * num_guide_steps * plan.guided_step.model_flops


KINDS = ("adamw", "muon", "spectron", "lora_muon")  # the last is for low_rank alone
STOPS = [("low_rank", kind, stop_at) for kind in KINDS for stop_at in (3, 8, 9, 20, 25)]
STOPS += [(name, kind, 8) for name in ("block_shuffle", "block_dense") for kind in KINDS[:3]]


@pytest.mark.parametrize(("name", "kind", "stop_at"), STOPS)
def test_a_resumed_run_is_bit_equal(
    tiny_values: MakeValues, tmp_path: Path, name: str, kind: str, stop_at: int
) -> None:
    """Stopped while guided, at the guides' last step, after it, and in the replay."""
    values = tiny_values(
        structure=STRUCTURES[name],
        guide=guide(share=None),
        batch={"num_steps": 20, "micro_batch": 4},
        optimizer={"kind": kind},
        eval={"every_steps": 5},
    )
    values["budget"] = {"flops": budget_for(values, 9)}
    whole = run(values, str(tmp_path / "whole"))
    assert whole.plan.guide.num_steps == 9
    with pytest.raises(InterruptedRun):
        run(values, str(tmp_path / "cut"), stop_at)
    cut = run(values, str(tmp_path / "cut"))
    pairs = zip(steps(cut), steps(whole), strict=True)
    assert all(a.loss == b.loss and a.grad_norm == b.grad_norm for a, b in pairs)
    assert [s.executed_flops for s in steps(cut)] == [s.executed_flops for s in steps(whole)]
    one, two = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tiny_values: MakeValues, tmp_path: Path) -> None:
    """Through guided and skipped steps and the end of the guides."""
    values = tiny_values(guide=guide(), batch={"num_steps": 8})
    wanted = [s.loss for s in steps(run(values, str(tmp_path / "eager")))]
    values["parallel"]["compile"] = True
    torch._dynamo.reset()
    found = [s.loss for s in steps(run(values, str(tmp_path / "compiled")))]
    assert found == pytest.approx(wanted, rel=1e-4)


class Counted(Trainer):
    """Compiles layers with a backend that only counts."""

    def _build(self) -> None:
        self.graphs = 0
        self.compiled: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            compile_ = partialmethod(nn.Module.compile, backend=self._count)
            patch.setattr(nn.Module, "compile", compile_)
            super()._build()

    def _count(self, graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph

    def _step(self) -> None:
        super()._step()
        self.compiled.append(self.graphs)


@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_layers_stay_compiled(tiny_values: MakeValues, tmp_path: Path, name: str) -> None:
    """Dense and structured ones, guided, skipped, evaluated on partial batches, and afterwards."""
    values = tiny_values(
        structure=STRUCTURES[name],
        guide=guide(),
        batch={"num_steps": 20},
        eval={"every_steps": 4},
        parallel={"compile": True},
    )
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    trainer = Counted(TrainConfig.from_dict(values), runs_dir=str(tmp_path))
    with torch._dynamo.config.patch(recompile_limit=8):  # PyTorch's own
        trainer.fit()
    assert frames["total"] == frames["ok"] > 8
    assert any(record.guide_skipped for record in steps(trainer))
    last = [r for r in RecordFile(trainer.run.records.path) if isinstance(r, EvalRecord)][-1]
    assert last.num_eval_tokens % trainer.config.tokens_per_step
    evaluated_and_trained = 2
    assert trainer.compiled[12] == trainer.compiled[11] + evaluated_and_trained
    assert trainer.graphs == trainer.compiled[12]


def losses(values: dict[str, Any], runs: str) -> list[float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FSDP2-wrapped module")
        return [step.loss for step in steps(run(values, runs))]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("variant", ["full", "stochastic"])
def test_two_processes_learn_what_one_does(
    tiny_values: MakeValues, tmp_path: Path, name: str, strategy: str, variant: str
) -> None:
    """No hang, guides included, and on past their end."""
    values = tiny_values(
        structure=STRUCTURES[name],
        guide=guide(variant=variant),
        optimizer={"kind": "adamw" if name == "block_dense" else "spectron"},
        batch={"num_sequences": 8, "micro_batch": 2, "num_steps": 10},
    )
    wanted = losses(values, str(tmp_path / "one"))
    values["parallel"]["strategy"] = strategy
    for found in run_distributed(losses, 2, values, str(tmp_path / "two")):
        assert found == pytest.approx(wanted, rel=2e-5, abs=0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"structure": {}, "guide": guide()}, "needs a structure"),
        ({"guide": guide(share=None)}, "guide.share=None and budget.flops=None: state exactly one"),
        ({"guide": guide(), "budget": BUDGET}, "state exactly one"),
        ({"guide": guide(share=1.5)}, r"guide.share=1.5 must lie in \(0, 1\]"),
        ({"budget": {"flops": -1.0}}, "budget.flops=-1.0 must be above 0"),
    ],
)
def test_bad_sections(tiny_values: MakeValues, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(tiny_values(**sections))


@pytest.mark.parametrize(
    ("num_guide_steps", "message"),
    [(0.4, "leaves nothing for a guide"), (21, "would guide 1.05 times the original steps")],
)
def test_budgets_that_do_not_fit(
    tiny_values: MakeValues, num_guide_steps: float, message: str
) -> None:
    values = tiny_values(guide=guide(share=None), batch={"num_steps": 20})
    values["budget"] = {"flops": budget_for(values, num_guide_steps)}
    with pytest.raises(ConfigError, match=message):
        describe(TrainConfig.from_dict(values))


def test_a_budget_under_one_step(tiny_values: MakeValues) -> None:
    config = TrainConfig.from_dict(tiny_values(budget={"flops": 1e5}))
    with pytest.raises(ConfigError, match=r"budget.flops=1e\+05 is under one step of"):
        describe(config)

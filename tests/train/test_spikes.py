"""The guard of loss spikes: when it speaks, and whom it names."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.stopping import StopAt
from torch import nn

from factorlm.data import TokenLoader
from factorlm.distributed import World
from factorlm.errors import InterruptedRun
from factorlm.layers import saved_name
from factorlm.records import LOSS_SPIKE, EventRecord, RecordFile, StepRecord
from factorlm.testing import run_distributed
from factorlm.train import TrainConfig
from factorlm.train.assemble import build_model
from factorlm.train.callbacks import Callback
from factorlm.train.spikes import (
    MIN_HISTORY,
    WINDOW,
    LossHistory,
    ModuleNorms,
    Spike,
    SpikeGuard,
)
from factorlm.train.state import full
from factorlm.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
NOISE = (3.0 + 0.1 * np.random.default_rng(0).standard_normal(400)).tolist()


@pytest.mark.parametrize("count", [MIN_HISTORY, WINDOW, 2 * WINDOW])
def test_the_limit_is_six_standard_deviations_over_the_mean_of_the_window(count: int) -> None:
    before = NOISE[:count][-WINDOW:]
    limit = statistics.fmean(before) + 6 * statistics.pstdev(before)
    assert LossHistory(NOISE[:count]).add(limit - 1e-9) is None
    spike = LossHistory(NOISE[:count]).add(limit + 1e-9)
    assert spike is not None
    assert spike.loss == limit + 1e-9
    assert spike.mean == pytest.approx(statistics.fmean(before), rel=1e-12)
    assert spike.sigma == pytest.approx(statistics.pstdev(before), rel=1e-12)


def test_too_short_a_history_says_nothing() -> None:
    assert LossHistory(NOISE[: MIN_HISTORY - 1]).add(1e9) is None


def test_noise_and_falling_losses_are_no_spikes() -> None:
    falling = [10 / (1 + step) ** 0.3 + noise for step, noise in enumerate(NOISE)]
    for losses in (NOISE, falling):
        history = LossHistory()
        assert not any(history.add(loss) for loss in losses)


def test_a_spike_of_many_steps_is_told_once_and_the_next_one_again() -> None:
    losses = [*NOISE[:200], 30.0, 25.0, 40.0, *NOISE[200:], 50.0]
    history = LossHistory()
    found = [step for step, loss in enumerate(losses) if history.add(loss)]
    assert found == [200, len(losses) - 1]


def test_a_replayed_history_goes_on_as_if_it_had_not_stopped() -> None:
    losses = [*NOISE[:200], 30.0, 25.0, 40.0, *NOISE[200:]]
    for cut in (150, 201, 202, 203, 300):
        whole, again = LossHistory(losses[:cut]), LossHistory(losses[:cut][-2 * WINDOW :])
        for loss in (*losses[cut:], 60.0):
            assert whole.add(loss) == again.add(loss)


def test_norms_of_modules(tiny_config: MakeConfig) -> None:
    """Against the concatenated tensors; a module without a gradient is not there."""
    model, _ = build_model(tiny_config(), device="cpu", guided=True)
    held = model.get_submodule("model.layers.1.mlp.c_fc")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    held.guide.weight.grad = None
    norms = ModuleNorms.of(model, grad_scale=3.0).by_module(ALONE)
    assert "model.layers.1.mlp.c_fc.guide" not in norms
    assert norms.keys() >= {
        "model.layers.1.mlp.c_proj.guide",
        "model.layers.0.mlp.c_fc",
        "model.layers.1.self_attn.q_proj",
        "model.embed_tokens",
        "model.norm",
    }
    parts = [held.structured.V, held.structured.U, held.structured.bias]
    for index, tensors in ((0, [3.0 * p.grad for p in parts]), (1, parts)):
        whole = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        found = norms["model.layers.1.mlp.c_fc"][index]
        assert found == pytest.approx(float(whole.norm()), rel=1e-6)


def usual_and_blown_up(model: nn.Module, name: str, factor: float) -> list[ModuleNorms]:
    """Norms of ten batches, and of one after ``name`` was scaled."""
    found = []
    for seed in range(11):
        ids = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(seed))
        if seed == 10:
            with torch.no_grad():
                model.get_parameter(name).mul_(factor)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(ModuleNorms.of(model, grad_scale=1.0))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.c_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.c_fc.V",
        "model.layers.1.mlp.c_proj.U",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("factor", [4.0, 50.0])
def test_the_layer_whose_weights_jumped_is_named(
    tiny_config: MakeConfig, name: str, factor: float
) -> None:
    model, _ = build_model(tiny_config(), device="cpu")
    guard = SpikeGuard(ALONE)
    *usual, last = usual_and_blown_up(model, name, factor)
    for norms in usual:
        guard.sample(norms)
    detail = guard.detail(Spike(9.0, 3.0, 0.1), last)
    assert detail["layer"] == name.rpartition(".")[0]
    assert 2 < detail["weight_growth"] <= factor * 1.01
    assert (detail["loss"], detail["mean"], detail["sigma"]) == (9.0, 3.0, 0.1)


def test_else_the_layer_whose_gradient_grew_most_is_named(tiny_config: MakeConfig) -> None:
    model, _ = build_model(tiny_config(), device="cpu")
    guard = SpikeGuard(ALONE)
    *usual, last = usual_and_blown_up(model, "model.layers.0.mlp.c_fc.weight", 1.0)
    for norms in usual:
        guard.sample(norms)
    names = list(dict.fromkeys(last.owners))
    medians = {n: statistics.median(s.by_module(ALONE)[n][0] for s in usual[-8:]) for n in names}
    module = "model.layers.1.self_attn.o_proj"
    for name, parameter in model.named_parameters():
        if name.startswith(module):
            parameter.grad *= 30
    blown = ModuleNorms.of(model, grad_scale=1.0)
    detail = guard.detail(Spike(9.0, 3.0, 0.1), blown)
    assert detail["layer"] == module
    growth = blown.by_module(ALONE)[module][0] / medians[module]
    assert detail["grad_growth"] == pytest.approx(growth, rel=1e-9)
    assert detail["weight_growth"] == pytest.approx(1.0)


def test_without_a_sample_no_layer_is_named(tiny_config: MakeConfig) -> None:
    model, _ = build_model(tiny_config(), device="cpu")
    norms = usual_and_blown_up(model, "model.norm.weight", 1.0)[-1]
    guard = SpikeGuard(ALONE)
    assert guard.wants_sample(5)
    detail = guard.detail(Spike(9.0, 3.0, 0.1), norms)
    assert detail == {"loss": 9.0, "mean": 3.0, "sigma": 0.1}
    guard.sample(norms)
    assert [step for step in range(1, 40) if guard.wants_sample(step)] == [16, 32]


class Break(Callback):
    """Fills a factor with noise after a step: the next step's loss shows it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            factor = trainer.model.get_parameter("model.layers.1.mlp.c_proj.U")
            with torch.no_grad():
                factor.normal_(std=1000.0, generator=torch.Generator().manual_seed(0))


class Kill(Callback):
    """Ends the process, as it were, once a spike was told."""

    def on_event(self, trainer: Trainer, record: EventRecord) -> None:
        if record.event == LOSS_SPIKE:
            raise RuntimeError(f"killed after step {record.step}")


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steep first fall of the loss is soon forgotten."""
    for module in ("spikes", "trainer"):
        monkeypatch.setattr(f"factorlm.train.{module}.WINDOW", MIN_HISTORY)


@pytest.fixture
def steady(tiny_config: MakeConfig) -> TrainConfig:
    """50 steps, the loss level from step 12 on."""
    return tiny_config(
        batch={"num_steps": 50},
        optimizer={"learning_rate": 1e-2},
        schedule={"kind": "constant", "warmup_ratio": 0.0},
        monitor={"every_steps": None},
    )


def fit(config: TrainConfig, runs: Path, *callbacks: Callback) -> RecordFile:
    trainer = Trainer(config, runs_dir=runs, callbacks=callbacks)
    trainer.fit()
    return trainer.run.records


def spikes(records: RecordFile) -> list[EventRecord]:
    return [r for r in records if isinstance(r, EventRecord) and r.event == LOSS_SPIKE]


@pytest.mark.usefixtures("short_window")
def test_a_spike_in_a_run_is_recorded_with_its_layer(steady: TrainConfig, tmp_path: Path) -> None:
    records = fit(steady, tmp_path, Break(48))
    (event,) = spikes(records)
    assert event.step == 49
    losses = [record.loss for record in records if isinstance(record, StepRecord)]
    before = losses[48 - MIN_HISTORY : 48]
    assert event.detail["layer"] == "model.layers.1.mlp.c_proj"
    assert event.detail["loss"] == losses[48]
    assert event.detail["mean"] == pytest.approx(statistics.fmean(before), rel=1e-9)
    assert event.detail["sigma"] == pytest.approx(statistics.pstdev(before), rel=1e-9)


@pytest.mark.usefixtures("short_window")
def test_a_resumed_run_tells_the_same_spike_once(steady: TrainConfig, tmp_path: Path) -> None:
    """Stopped before the spike; and killed after it, so that its step is done again."""
    (wanted,) = spikes(fit(steady, tmp_path / "whole", Break(48)))
    with pytest.raises(InterruptedRun):
        fit(steady, tmp_path / "cut", StopAt(40))
    with pytest.raises(RuntimeError, match="killed after step 49"):
        fit(steady, tmp_path / "cut", Break(48), Kill())
    assert len(spikes(RecordFile(tmp_path / "cut" / "tiny" / "records.jsonl"))) == 1
    (found,) = spikes(fit(steady, tmp_path / "cut", Break(48)))
    for key in ("loss", "mean", "sigma", "layer"):
        assert found.detail[key] == wanted.detail[key]


def test_an_ordinary_run_has_no_spike(tiny_config: MakeConfig, tmp_path: Path) -> None:
    assert spikes(fit(tiny_config(batch={"num_steps": 150}), tmp_path)) == []


@pytest.mark.usefixtures("short_window")
def test_a_batch_of_another_text_is_told(
    steady: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TokenLoader.batch

    def batch(self: TokenLoader, step: int) -> np.ndarray:
        ids = real(self, step)
        return (ids + 100) % 257 if step == 45 else ids

    monkeypatch.setattr(TokenLoader, "batch", batch)
    (event,) = spikes(fit(steady, tmp_path))
    assert event.step == 46
    assert event.detail["layer"] in dict(build_model(steady)[0].named_modules())
    assert event.detail["weight_growth"] < 2


def sharded(values: dict[str, Any], runs: str) -> None:
    """On each rank: FSDP2's parts add up to the norms of whole tensors."""
    trainer = Trainer(TrainConfig.from_dict(values), runs_dir=runs)
    seen: list[dict[str, tuple[float, float]]] = []
    step = trainer._step

    def compare() -> None:
        update = trainer.optimizer.step

        def compared(*args: object) -> None:
            whole: dict[str, list[torch.Tensor]] = {}
            for name, parameter in trainer.model.named_parameters():
                pair = torch.stack([full(parameter.grad).norm(), full(parameter).norm()])
                whole.setdefault(saved_name(name).rpartition(".")[0], []).append(pair.square())
            found = ModuleNorms.of(trainer.model, grad_scale=1.0)
            assert found.is_sharded
            seen.append(found.by_module(trainer.world))
            assert seen[-1].keys() == whole.keys()
            for module, pair in seen[-1].items():
                wanted = torch.stack(whole[module]).sum(0).sqrt().tolist()
                assert pair == pytest.approx(wanted, rel=1e-5)
            update()

        trainer.optimizer.step = compared  # type: ignore[method-assign]
        step()
        trainer.optimizer.step = update  # type: ignore[method-assign]

    trainer._step = compare  # type: ignore[method-assign]
    trainer.fit()
    assert len(seen) == 3


@pytest.mark.slow
def test_norms_of_sharded_modules(
    tiny_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = tiny_values(
        structure={"structure": "block_shuffle", "num_blocks": 4},
        guide={"variant": "full", "share": 1.0},
        batch={"num_steps": 3},
        parallel={"strategy": "fsdp2"},
    )
    run_distributed(sharded, 2, values, str(tmp_path))

"""Monitors against singular values, dense differences and gradients noted beside them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.stopping import StopAt
from torch import Tensor

from factorlm.errors import ConfigError, InterruptedRun
from factorlm.layers import StructuredLinear, saved_name
from factorlm.optim import GuideSchedule
from factorlm.records import LOSS_SPIKE, EventRecord, MonitorRecord, RecordFile, StepRecord
from factorlm.testing import run_distributed
from factorlm.train import TrainConfig
from factorlm.train.callbacks import Callback
from factorlm.train.metrics import ProgressBar, Tracker
from factorlm.train.monitor import Monitor
from factorlm.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
MakeValues = Callable[..., dict[str, Any]]
STRUCTURES: dict[str, dict[str, Any]] = {
    "low_rank": {"structure": "low_rank", "rank": 8},
    "block_shuffle": {"structure": "block_shuffle", "num_blocks": 4},
    "block_dense": {"structure": "block_dense", "num_blocks": 2, "rank": 16},
    "dense": {"structure": "dense"},
}
LAYERS = ["model.layers.1.mlp.c_fc", "model.layers.1.mlp.c_proj"]


class Beside(Callback):
    """Notes dense weights and factors after every step, and every gradient before clipping."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.factors: list[dict[str, dict[str, Tensor]]] = []
        self.grads: list[dict[str, dict[str, Tensor]]] = []
        self.monitors: list[MonitorRecord] = []

    def layers(self, trainer: Trainer) -> dict[str, StructuredLinear]:
        modules = trainer.model.named_modules()
        return {saved_name(n): m for n, m in modules if isinstance(m, StructuredLinear)}

    def on_start(self, trainer: Trainer, run: object) -> None:
        self._note(trainer)
        self.current: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers(trainer).items():
            self.current[name] = {}
            for key, parameter in layer.named_parameters():
                parameter.register_post_accumulate_grad_hook(self._hook(name, key))

    def _hook(self, name: str, key: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.current[name][key] = parameter.grad.detach().double().clone()

        return note

    def _note(self, trainer: Trainer) -> None:
        layers = self.layers(trainer)
        self.factors.append(
            {
                name: {f.name: layer.get_parameter(f.name).detach().double() for f in layer.factors}
                for name, layer in layers.items()
            }
        )
        wide = {name: _wide(layer) for name, layer in layers.items()}
        self.weights.append(wide)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._note(trainer)
        self.grads.append({name: dict(found) for name, found in self.current.items()})

    def on_monitor(self, trainer: Trainer, record: MonitorRecord) -> None:
        self.monitors.append(record)


def _wide(layer: StructuredLinear) -> Tensor:
    twin = layer.config.build(
        layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64
    )
    twin.load_state_dict(layer.state_dict())
    return twin.weight.clone()


def fit(config: TrainConfig, runs: Path, *callbacks: Callback) -> Trainer:
    trainer = Trainer(config, runs_dir=runs, callbacks=callbacks)
    trainer.fit()
    return trainer


def monitors(records: RecordFile) -> list[MonitorRecord]:
    return [record for record in records if isinstance(record, MonitorRecord)]


def losses(records: RecordFile) -> list[float]:
    return [record.loss for record in records if isinstance(record, StepRecord)]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_records_say_what_each_step_did(
    tiny_config: MakeConfig, tmp_path: Path, name: str, guided: bool
) -> None:
    guide = {"variant": "full", "share": 0.5} if guided else {}
    config = tiny_config(
        structure=STRUCTURES[name],
        guide=guide,
        monitor={"every_steps": 3},
        optimizer={"clip_grad_norm": 0.05},
    )
    beside = Beside()
    trainer = fit(config, tmp_path, beside)
    found = monitors(trainer.run.records)
    assert found == beside.monitors
    assert [record.step for record in found] == [3, 6, 9]
    schedule = GuideSchedule(num_steps=5)
    for record in found:
        step = record.step
        alpha = schedule.alpha_at(step - 1) if guided and step <= 5 else None
        assert record.guide_alpha == (None if alpha is None else pytest.approx(alpha))
        assert list(record.layers) == LAYERS
        for layer, values in record.layers.items():
            after, before = beside.weights[step][layer], beside.weights[step - 1][layer]
            change = (after - before).square().mean().sqrt()
            assert change > 0
            assert values["product_rms"] == pytest.approx(float(after.square().mean().sqrt()))
            assert values["change_rms"] == pytest.approx(float(change), rel=1e-6)
            grads = torch.cat([g.flatten() for g in beside.grads[step - 1][layer].values()])
            assert values["grad_norm"] == pytest.approx(float(grads.norm()), rel=1e-5)
            factors = beside.factors[step][layer]
            assert list(values["factor_norms"]) == list(factors)
            for factor, norm in values["factor_norms"].items():
                matrix = factors[factor]
                whole = torch.block_diag(*(matrix if matrix.ndim == 3 else matrix[None]))
                assert norm == pytest.approx(float(torch.linalg.svdvals(whole)[0]), rel=1e-9)


def test_monitoring_changes_no_bit(tiny_config: MakeConfig, tmp_path: Path) -> None:
    overrides = {"hidden_size": 32, "intermediate_size": 64, "residual_dropout": 0.3}
    found = []
    for every in (1, None):
        config = tiny_config(
            model={"overrides": overrides},
            guide={"variant": "stochastic", "share": 0.5},
            monitor={"every_steps": every},
        )
        trainer = fit(config, tmp_path / str(every))
        assert len(monitors(trainer.run.records)) == (10 if every else 0)
        weights = load_file(trainer.run.path / "model" / "model.safetensors")
        found.append((losses(trainer.run.records), weights))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_a_dense_model_has_nothing_to_monitor(tiny_config: MakeConfig, tmp_path: Path) -> None:
    trainer = fit(tiny_config(structure={}, monitor={"every_steps": 1}), tmp_path)
    assert monitors(trainer.run.records) == []


class Kill(Callback):
    """Ends the process, as it were, after step 8."""

    def on_monitor(self, trainer: Trainer, record: MonitorRecord) -> None:
        if record.step == 8:
            raise RuntimeError("killed")


def test_a_run_stopped_and_killed_has_the_same_monitors(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(
        guide={"variant": "full", "share": 0.7}, monitor={"every_steps": 2}, seed=3
    )
    wanted = monitors(fit(config, tmp_path / "whole").run.records)
    with pytest.raises(InterruptedRun):
        fit(config, tmp_path / "cut", StopAt(4))
    with pytest.raises(RuntimeError, match="killed"):
        fit(config, tmp_path / "cut", Kill())
    assert monitors(fit(config, tmp_path / "cut").run.records) == wanted


def test_a_resumed_run_may_be_monitored_otherwise(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        fit(tiny_config(monitor={"every_steps": 2}), tmp_path, StopAt(4))
    records = fit(tiny_config(monitor={"every_steps": 5}), tmp_path).run.records
    assert [record.step for record in monitors(records)] == [2, 4, 10]
    with pytest.raises(ConfigError, match=r"monitor\.every_steps=0 must be at least 1"):
        tiny_config(monitor={"every_steps": 0})


def test_weights_that_are_not_finite_are_recorded_as_such(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """The run ends at the next loss, with the names of the gradients; not in an eigensolver."""
    trainer = fit(tiny_config(), tmp_path)
    layer = trainer.model.get_submodule(LAYERS[0])
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    monitor = Monitor(trainer.model, 1, trainer.world)
    monitor.before_update(1, 2.0, 1.0)
    with torch.no_grad():
        layer.V[0, 0] = math.inf
    _, record = monitor.after_update(None)
    assert record is not None
    assert math.isnan(record.layers[LAYERS[0]]["factor_norms"]["V"])
    assert not math.isfinite(record.layers[LAYERS[0]]["product_rms"])
    assert math.isfinite(record.layers[LAYERS[1]]["factor_norms"]["V"])


def test_trackers_get_every_number(tiny_config: MakeConfig, tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    tracker = Tracker(lambda values, step: logged.append((step, values)), lambda: None)
    config = tiny_config(guide={"variant": "full", "share": 1.0}, monitor={"every_steps": 5})
    (first, second) = monitors(fit(config, tmp_path, tracker).run.records)
    found = [(step, v) for step, v in logged if "monitor/guide_alpha" in v]
    assert [step for step, _ in found] == [5, 10]
    for record, (_, values) in zip((first, second), found, strict=True):
        layer = record.layers[LAYERS[1]]
        assert values["monitor/guide_alpha"] == record.guide_alpha
        assert values[f"monitor/{LAYERS[1]}/norm_U"] == layer["factor_norms"]["U"]
        assert values[f"monitor/{LAYERS[1]}/change_rms"] == layer["change_rms"]
        assert values[f"monitor/{LAYERS[1]}/product_rms"] == layer["product_rms"]
        assert values[f"monitor/{LAYERS[1]}/grad_norm"] == layer["grad_norm"]
        assert len(values) == 1 + 2 * 5


def test_a_spike_is_one_readable_line(tiny_config: MakeConfig, tmp_path: Path) -> None:
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, width=200))
    detail = {"loss": 9.123456789, "mean": 3.0, "sigma": 0.012345678, "layer": LAYERS[0]}
    trainer = Trainer(tiny_config(), runs_dir=tmp_path)
    bar.on_event(trainer, EventRecord(event=LOSS_SPIKE, step=41, detail=detail))
    expected = f"step 41  loss spike: loss 9.123, mean 3, sigma 0.01235, layer {LAYERS[0]}\n"
    assert output.getvalue() == expected


def run(values: dict[str, Any], runs: str) -> list[MonitorRecord]:
    return monitors(fit(TrainConfig.from_dict(values), Path(runs)).run.records)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_rank", "block_shuffle"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_what_one_does(
    tiny_values: MakeValues, tmp_path: Path, name: str, strategy: str
) -> None:
    values = tiny_values(
        structure=STRUCTURES[name],
        guide={"variant": "stochastic", "share": 0.6},
        monitor={"every_steps": 1},
        optimizer={"clip_grad_norm": 0.1},
    )
    wanted = run(values, str(tmp_path / "one"))
    values["parallel"]["strategy"] = strategy
    for found in run_distributed(run, 2, values, str(tmp_path / "two")):
        assert len(found) == len(wanted) == 10
        for record, other in zip(found, wanted, strict=True):
            assert (record.step, record.guide_alpha) == (other.step, other.guide_alpha)
            assert list(record.layers) == list(other.layers) == LAYERS
            for layer, one in other.layers.items():
                two = record.layers[layer]
                assert two["factor_norms"] == pytest.approx(one["factor_norms"], rel=1e-3)
                for key in ("product_rms", "change_rms", "grad_norm"):
                    assert two[key] == pytest.approx(one[key], rel=1e-2)  # type: ignore[literal-required]

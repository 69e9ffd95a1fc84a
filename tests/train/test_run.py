"""The folder of a run: when it may be taken up with another recipe, and how damage is survived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tests.stopping import StopAt

from factorlm.errors import ConfigError, DataError, InterruptedRun, StorageError
from factorlm.records import EvalRecord, EventRecord, Record, RecordFile, RunRecord, StepRecord
from factorlm.train import TrainConfig
from factorlm.train.callbacks import Callback
from factorlm.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def fit(config: TrainConfig, runs: Path, *callbacks: Callback) -> list[Record]:
    trainer = Trainer(config, runs_dir=runs, callbacks=callbacks)
    trainer.fit()
    return list(RecordFile(trainer.run.records.path))


class Killed(Exception):  # noqa: N818 - it stands for a signal
    """Of a run that ends as by ``kill -9``."""


class KillAt(Callback):
    """Ends a run after a step without a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            raise Killed


def test_a_recipe_may_be_corrected_until_the_run_has_begun(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds no prepared data"):
        fit(tiny_config(data={"path": str(tmp_path / "absent")}, seed=1), tmp_path)
    fit(tiny_config(batch={"num_steps": 1}), tmp_path)
    with pytest.raises(ConfigError, match="seed=1, was 0"):
        fit(tiny_config(batch={"num_steps": 1}, seed=1), tmp_path)


@pytest.mark.parametrize("text", ["", "{{{"])
def test_a_damaged_config_is_named(tiny_config: MakeConfig, tmp_path: Path, text: str) -> None:
    with pytest.raises(InterruptedRun):
        fit(tiny_config(), tmp_path, StopAt(2))
    (tmp_path / "tiny" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        fit(tiny_config(), tmp_path)


def test_no_evaluation_is_recorded_twice(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(eval={"every_steps": 5}, batch={"num_steps": 7})
    for callback in (StopAt(5), KillAt(6), KillAt(6)):
        with pytest.raises((InterruptedRun, Killed)):
            fit(config, tmp_path, callback)
    records = fit(config, tmp_path)
    assert [record.step for record in records if isinstance(record, EvalRecord)] == [5, 7]


def test_a_run_whose_first_record_was_cut_has_one(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        fit(tiny_config(), tmp_path, StopAt(2))
    (tmp_path / "tiny" / "records.jsonl").write_text('{"type": "run", "form')
    assert sum(isinstance(record, RunRecord) for record in fit(tiny_config(), tmp_path)) == 1


@pytest.mark.filterwarnings("ignore:checkpoint left out")
def test_a_damaged_checkpoint_is_written_anew(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(checkpoint={"every_steps": 2})
    with pytest.raises(Killed):
        fit(config, tmp_path, KillAt(7))
    file = tmp_path / "tiny" / "checkpoints" / "step-6" / "model.safetensors"
    file.unlink()
    with pytest.raises(Killed):
        fit(config, tmp_path, KillAt(7))
    assert file.exists()


def test_a_full_disk_under_the_best_model_does_not_end_the_run(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors has an error of its own for it."""
    save = Trainer._save_model
    failures = iter([True])

    def save_model(self: Trainer, name: str) -> None:
        with monkeypatch.context() as patch:
            if next(failures, False):
                patch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
            save(self, name)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(Trainer, "_save_model", save_model)
    records = fit(tiny_config(eval={"every_steps": 5}), tmp_path)
    events = [record for record in records if isinstance(record, EventRecord)]
    assert [event.event for event in events] == ["save failed", "saved", "finished"]
    assert "model-best: No space" in events[0].detail["error"]
    failures = iter([True])
    with pytest.raises(StorageError, match="model-best: No space"):
        fit(tiny_config(), tmp_path / "last")

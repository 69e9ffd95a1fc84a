"""What a run shows: progress in a terminal and elsewhere, W&B where it is installed."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from factorlm.errors import ConfigError
from factorlm.records import RecordFile, StepRecord
from factorlm.train import TrainConfig
from factorlm.train.metrics import ProgressBar
from factorlm.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1e11 FLOP/s."""
    monkeypatch.setattr("factorlm.train.metrics.matmul_flops_per_second", lambda *args: 1e11)


def shown(config: TrainConfig, runs: Path, *, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200)
    Trainer(config, runs_dir=runs, callbacks=[ProgressBar(console)]).fit()
    return output.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_loss_perplexity_speed_and_utilisation(
    tiny_config: MakeConfig, tmp_path: Path, terminal: bool
) -> None:
    text = shown(tiny_config(), tmp_path, terminal=terminal)
    records = list(RecordFile(tmp_path / "tiny" / "records.jsonl"))
    steps = [record for record in records if isinstance(record, StepRecord)]
    run = records[0]
    loss = sum(step.loss for step in steps) / len(steps)
    speed = 128 * 1000 * len(steps) / sum(step.step_ms for step in steps)
    utilisation = 3 * run.forward_flops_per_token * speed / 1e11  # type: ignore[attr-defined]
    assert f"loss {loss:.4f}" in text
    assert re.search(r"ppl \d+\.\d\d", text)
    assert f"{speed:,.0f} tok/s" in text
    assert f"MFU {utilisation:.1%}" in text
    assert "validation loss" in text
    assert "finished" in text
    assert "10/10" in text


def test_utilisation_is_never_over_one(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the rate was measured beside another job."""
    monkeypatch.setattr("factorlm.train.metrics.matmul_flops_per_second", lambda *args: 1.0)
    text = shown(tiny_config(), tmp_path, terminal=False)
    assert "MFU 100.0%" in text


def test_a_missing_wandb_is_named_with_its_extra(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny_config(tracking={"wandb_project": "p"})
    with pytest.raises(ConfigError, match=r"tracking\.wandb_project='p' needs wandb: pip install"):
        Trainer(config, runs_dir=tmp_path).fit()


def test_wandb_gets_every_step_and_evaluation(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    started: dict[str, Any] = {}

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            started["finished"] = True

    module = ModuleType("wandb")
    module.init = lambda **fields: started.update(fields) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = tiny_config(tracking={"wandb_project": "p"})
    Trainer(config, runs_dir=tmp_path).fit()
    assert (started["project"], started["name"], started["finished"]) == ("p", "tiny", True)
    assert started["config"] == config.to_dict()
    assert [step for step, values in logged if "train/loss" in values] == list(range(1, 11))
    assert [step for step, values in logged if "validation/loss" in values] == [10]

"""A finished run with a tiny model that reads bytes."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from factorlm import LowRankConfig, factorize_
from factorlm.data import PrepareConfig, prepare
from factorlm.records import EvalRecord, EventRecord, RecordFile, RunRecord, StepRecord
from factorlm.testing.models import tiny_model

WITHOUT_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "transformers", "tokenizers", "datasets"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from factorlm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

CONTEXT_LENGTH = 16
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


RunWithoutTorch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_without_torch(tmp_path: Path) -> RunWithoutTorch:
    """Runs a command, in ``tmp_path``, where torch and what brings it cannot be imported."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=600,
        )

    return run


@dataclass(frozen=True)
class TinyRun:
    """Where things are."""

    path: Path
    data: Path
    text: Path

    @property
    def records(self) -> RecordFile:
        """The run's."""
        return RecordFile(self.path / "records.jsonl")


@pytest.fixture(scope="session")
def tiny_run_made_once(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    root = tmp_path_factory.mktemp("tiny")
    run = TinyRun(path=root / "runs" / "tiny", data=root / "data", text=root / "text.txt")
    run.text.write_text(TEXT)
    dataset = prepare(
        PrepareConfig(sources=(str(run.text),), output=str(run.data), tokenizer="bytes", workers=1)
    )
    run.path.mkdir(parents=True)
    for record in _records(run.data):
        run.records.append(record)
    model = tiny_model("starcoder2", vocab_size=257)
    factorize_(model, LowRankConfig(rank=8))
    for name in ("model", "model-best"):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        model.save_pretrained(run.path / name)
        shutil.copytree(dataset.tokenizer_folder, run.path / name, dirs_exist_ok=True)
    return run


@pytest.fixture
def tiny_run(tiny_run_made_once: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy that a test may write to; its best model is of step 2 of 3."""
    path = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run_made_once.path, path)
    return TinyRun(path=path, data=tiny_run_made_once.data, text=tiny_run_made_once.text)


def _records(data: Path) -> list[RunRecord | StepRecord | EvalRecord | EventRecord]:
    run = RunRecord(
        name="tiny",
        config={"data": {"path": str(data), "context_length": CONTEXT_LENGTH}, "structure": {}},
        environment={},
        num_params=1000,
        num_ffn_params=500,
        num_non_embedding_params=800,
        forward_flops_per_token=2000.0,
        training_flops=3 * 2000.0 * 300,
        num_steps=3,
        tokens_per_step=100,
    )
    records: list[RunRecord | StepRecord | EvalRecord | EventRecord] = [run]
    for step, loss in ((1, 5.0), (2, 4.0), (3, 4.5)):
        records.append(
            StepRecord(
                step=step,
                num_tokens=100 * step,
                loss=loss,
                learning_rate=1e-3,
                grad_norm=1.0,
                step_ms=10.0,
            )
        )
        records.append(
            EvalRecord(
                step=step,
                num_tokens=100 * step,
                source="validation",
                loss=loss,
                perplexity=math.exp(loss),
                bits_per_byte=None,
                num_eval_tokens=50,
                seconds=1.0,
            )
        )
    return [*records, EventRecord(event="finished", step=3)]

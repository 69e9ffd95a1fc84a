"""A run that is killed and started again is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from factorlm.cli.main import main
from factorlm.records import EvalRecord, RecordFile, StepRecord

NUM_STEPS = 120


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dropout, accumulation, AdamW, cosine, evaluations: all that has state or chance."""
    folder = tmp_path_factory.mktemp("kill")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=5)) for _ in range(200)]
    (folder / "text.txt").write_text(" ".join(chance.choices(words, k=20_000)))
    source, data = str(folder / "text.txt"), str(folder / "data")
    assert main(["prepare", source, "-o", data, "--tokenizer", "bytes"]) == 0
    values = {
        "model": {
            "preset": "gpt_tiny",
            "vocab_size": 257,
            "overrides": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "residual_dropout": 0.1,
                "embedding_dropout": 0.1,
            },
        },
        "structure": {"structure": "low_rank", "rank": 8},
        "guide": {"variant": "none"},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "data": {"path": data, "context_length": 32},
        "batch": {"num_sequences": 8, "micro_batch": 4, "num_steps": NUM_STEPS},
        "eval": {"every_steps": 25, "num_tokens": 1024},
        "checkpoint": {"every_steps": 10},
        "parallel": {"num_threads": 1},
    }
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(recipe: Path, runs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "factorlm", "train", str(recipe), "--runs-dir", str(runs)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_for_step(runs: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until the run has logged ``step`` or has ended."""
    records = runs / "killed" / "records.jsonl"
    while process.poll() is None:
        if records.exists() and f'"step": {step},' in records.read_text():
            return
        time.sleep(0.002)


def facts(runs: Path) -> tuple[list[tuple[int, str, str]], list[tuple[int, str]], dict]:
    """Losses and gradient norms as hex, evaluations as hex, the final weights."""
    records = list(RecordFile(runs / "killed" / "records.jsonl"))
    steps = [
        (r.step, r.loss.hex(), r.grad_norm.hex()) for r in records if isinstance(r, StepRecord)
    ]
    evals = [(r.step, r.loss.hex()) for r in records if isinstance(r, EvalRecord)]
    return steps, evals, load_file(runs / "killed" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    process = start(recipe, runs)
    assert process.wait() == 0, process.stderr and process.stderr.read().decode()
    return runs


def assert_same(runs: Path, undisturbed: Path) -> None:
    steps, evals, weights = facts(runs)
    wanted_steps, wanted_evals, wanted_weights = facts(undisturbed)
    assert [step for step, _, _ in steps] == list(range(1, NUM_STEPS + 1))
    assert steps == wanted_steps
    assert evals == wanted_evals
    assert weights.keys() == wanted_weights.keys()
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in weights)


@pytest.mark.slow
def test_killed_five_times_equals_undisturbed(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    chance = random.Random(1)
    kill_at = sorted(chance.sample(range(3, NUM_STEPS - 3), 5))
    for step in kill_at:
        process = start(recipe, tmp_path)
        wait_for_step(tmp_path, step, process)
        time.sleep(chance.random() * 0.03)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(recipe, tmp_path).wait() == 0
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_75(
    recipe: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(recipe, tmp_path)
    wait_for_step(tmp_path, 33, process)
    process.send_signal(number)
    process.send_signal(number)
    _, error = process.communicate(timeout=25)
    assert process.returncode == 75, error.decode()
    assert "run the same command to go on" in error.decode()
    lines = (tmp_path / "killed" / "records.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["event"] == "interrupted"
    assert (tmp_path / "killed" / "checkpoints" / f"step-{last['step']}").is_dir()
    assert start(recipe, tmp_path).wait() == 0
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_finished_run_says_so_and_a_changed_field_is_refused(
    recipe: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe), "--runs-dir", str(undisturbed)]
    assert main(command) == 0
    assert "finished" in "".join(capsys.readouterr())
    assert main([*command, "--optimizer.learning_rate", "0.5"]) == 3
    message = capsys.readouterr().err
    assert "optimizer.learning_rate=0.5, was 0.001" in message
    assert main([*command, "--eval.every_steps", "7"]) == 0

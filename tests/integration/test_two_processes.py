"""``factorlm train`` under torchrun's variables, with a peer that goes away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from factorlm.cli.main import main
from factorlm.records import RecordFile, StepRecord


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    data = str(tmp_path / "data")
    assert main(["prepare", str(tmp_path / "text.txt"), "-o", data, "--tokenizer", "bytes"]) == 0
    values = {
        "model": {
            "preset": "gpt_nano",
            "vocab_size": 257,
            "overrides": {"num_hidden_layers": 2},
        },
        "data": {"path": data, "context_length": 32},
        "batch": {"num_sequences": 4, "num_steps": 120},
        "checkpoint": {"every_steps": 20},
        "parallel": {"num_threads": 1},
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(recipe: Path, rank: int, port: int) -> subprocess.Popen[str]:
    """One of two processes, as torchrun would start it."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment["MASTER_ADDR"] = "127.0.0.1"
    command = [sys.executable, "-m", "factorlm", "train", str(recipe)]
    command += ["--runs-dir", str(recipe.parent / "runs")]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def start_pair(recipe: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(recipe, rank, port) for rank in (0, 1)]


def steps(recipe: Path) -> list[int]:
    path = recipe.parent / "runs" / "pair" / "records.jsonl"
    if not path.exists():
        return []
    return [record.step for record in RecordFile(path) if isinstance(record, StepRecord)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_ends_the_other_with_exit_code_7_and_both_resume(
    recipe: Path, victim: int
) -> None:
    pair = start_pair(recipe)
    while len(steps(recipe)) < 30 and pair[victim].poll() is None:
        time.sleep(0.02)
    pair[victim].kill()
    _, error = pair[1 - victim].communicate(timeout=15)
    assert pair[1 - victim].returncode == 7, error
    assert "lost a peer" in error
    again = start_pair(recipe)
    for process in again:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert steps(recipe) == list(range(1, 121))


@pytest.mark.slow
def test_another_recipe_is_refused_by_every_process(recipe: Path) -> None:
    assert [process.wait(120) for process in start_pair(recipe)] == [0, 0]
    recipe.write_text(recipe.read_text() + "seed: 5\n")
    for process in start_pair(recipe):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 3
        assert "seed=5, was 0" in error

"""A ladder by the command line, with real training: planned, run, killed, stopped, gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from factorlm.cli.main import main
from factorlm.data import open_dataset
from factorlm.records import EvalRecord, RecordFile, RunRecord, StepRecord
from factorlm.scaling.ladder import load_ladder
from factorlm.scaling.ladder.plan import Plan
from factorlm.scaling.ladder.prediction import num_eval_tokens

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families, two sizes; the runs of a family take a few seconds each."""
    folder = tmp_path_factory.mktemp("ladder")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=5)) for _ in range(200)]
    (folder / "text.txt").write_text(" ".join(chance.choices(words, k=20_000)))
    data = str(folder / "data")
    assert main(["prepare", str(folder / "text.txt"), "-o", data, "--tokenizer", "bytes"]) == 0
    recipe = {
        "model": {"preset": "gpt_nano", "vocab_size": 257, "overrides": {"num_hidden_layers": 2}},
        "guide": {"variant": "none"},
        "data": {"path": data, "context_length": 32},
        "batch": {"num_sequences": 8, "num_steps": STEPS},
        "eval": {"every_steps": 15, "num_tokens": 256, "final_num_tokens": 512},
        "checkpoint": {"every_steps": 10},
        "parallel": {"precision": "fp32", "device": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = {
        "recipe": "recipe.yaml",
        "sizes": {
            name: {"model": {"overrides": {"hidden_size": n, "intermediate_size": 4 * n}}}
            for name, n in (("a", 16), ("b", 32))
        },
        "families": {
            "dense": {},
            "low_rank": {"structure": {"structure": "low_rank", "param_ratio": 0.5}},
        },
        "tokens": {"rule": "fixed", "num_tokens": STEPS * 256},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


NAMES = [f"{family}-{size}-s0" for size in "ab" for family in ("dense", "low_rank")]


def start(ladder: Path, runs: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "factorlm", "scale", "run", str(ladder)]
    command += ["--runs-dir", str(runs), "--workers", "1", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def results(folder: Path, names: Sequence[str] = NAMES) -> dict[str, tuple[list[str], list[str]]]:
    """Run -> every loss of training and evaluation, in hex."""
    found = {}
    for name in names:
        records = list(RecordFile(folder / name / "records.jsonl"))
        steps = [r.loss.hex() for r in records if isinstance(r, StepRecord)]
        assert len(steps) == STEPS
        found[name] = steps, [r.loss.hex() for r in records if isinstance(r, EvalRecord)]
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def num_steps(path: Path) -> int:
    if not path.exists():
        return 0
    return sum('"type": "step"' in line for line in path.read_text().splitlines())


@pytest.fixture(scope="module")
def undisturbed(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a queue that nothing happened to."""
    runs = tmp_path_factory.mktemp("undisturbed")
    assert main(["scale", "run", str(ladder), "--runs-dir", str(runs), "--workers", "2"]) == 0
    return runs / "toy"


def test_the_plan_counts_and_predicts(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan: list[str] = ["scale", "plan", str(ladder), "--runs-dir", str(tmp_path)]
    assert main([*plan, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in told["runs"]] == NAMES
    for run in told["runs"]:
        assert run["num_steps"] == STEPS
        assert run["hours"] > 0
        assert run["loss"] is None
    assert told["hours_left"] >= max(run["hours"] for run in told["runs"])
    calibrated = sorted((tmp_path / "toy/calibration").glob("*/records.jsonl"))
    assert len(calibrated) == 4
    times = [path.stat().st_mtime_ns for path in calibrated]
    assert main(plan) == 0
    assert "4 runs, 4 of them to run" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in calibrated] == times


def test_the_tokens_that_it_expects_to_be_evaluated_are(ladder: Path, undisturbed: Path) -> None:
    for run in Plan(load_ladder(ladder)).runs({}):
        records = RecordFile(undisturbed / run.name / "records.jsonl")
        done = sum(r.num_eval_tokens for r in records if isinstance(r, EvalRecord))
        split = open_dataset(run.config.data.path).split("validation").num_tokens
        assert num_eval_tokens(run.config, STEPS, split) == done == 3 * 256 + 512


def test_a_run_is_the_one_that_factorlm_train_makes(
    ladder: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = undisturbed / "low_rank-b-s0.yaml"
    assert main(["train", str(recipe), "--runs-dir", str(tmp_path)]) == 0
    alone = list(RecordFile(tmp_path / "low_rank-b-s0/records.jsonl"))
    losses = [record.loss.hex() for record in alone if isinstance(record, StepRecord)]
    assert losses == results(undisturbed)["low_rank-b-s0"][0]
    config = next(record for record in alone if isinstance(record, RunRecord)).config
    assert config["labels"]["family"] == "low_rank"


def test_a_queue_that_is_killed_goes_on_and_ends_the_same(
    ladder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    queue = start(ladder, tmp_path)
    folder = tmp_path / "toy"
    wait_for(lambda: num_steps(folder / NAMES[1] / "records.jsonl") >= 12)
    os.killpg(queue.pid, signal.SIGKILL)  # its run, in a session of its own, lives on
    queue.wait()
    first = (folder / NAMES[0] / "records.jsonl").read_bytes()
    again = start(ladder, tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert (folder / NAMES[0] / "records.jsonl").read_bytes() == first
    assert results(folder) == results(undisturbed)
    resumed = (folder / f"{NAMES[1]}.log").read_text()
    assert "in use" not in resumed


def test_ctrl_c_saves_and_the_same_command_goes_on(
    ladder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    queue = start(ladder, tmp_path)
    folder = tmp_path / "toy"
    wait_for(lambda: num_steps(folder / NAMES[0] / "records.jsonl") >= 5)
    queue.send_signal(signal.SIGINT)
    output, _ = queue.communicate(timeout=120)
    assert queue.returncode == 75, output
    assert "the same command goes on" in output
    assert list((folder / NAMES[0] / "checkpoints").glob("step-*"))
    again = start(ladder, tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert results(folder) == results(undisturbed)


@pytest.mark.parametrize(
    ("kind", "package", "options"),
    [
        ("ray", "ray", {"num_cpus": 2}),
        ("slurm", "submitit", {"cluster": "local", "timeout_min": 10}),
    ],
)
def test_a_cluster_is_stopped_and_goes_on(
    kind: str,
    package: str,
    options: dict[str, Any],
    ladder: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    """A Ray that is started here, and submitit's processes."""
    pytest.importorskip(package)
    values = yaml.safe_load(ladder.read_text()) | {"name": "toy"}
    values["executor"] = {"kind": kind, "options": options}
    del values["families"]["low_rank"]
    there = ladder.with_name(f"{kind}.yaml")
    there.write_text(yaml.safe_dump(values, sort_keys=False))
    queue = start(there, tmp_path)
    folder = tmp_path / "toy"
    wait_for(lambda: num_steps(folder / "dense-a-s0/records.jsonl") >= 5)
    queue.send_signal(signal.SIGINT)
    output, _ = queue.communicate(timeout=120)
    assert queue.returncode == 75, output
    assert list((folder / "dense-a-s0/checkpoints").glob("step-*"))
    again = start(there, tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    names = ["dense-a-s0", "dense-b-s0"]
    assert results(folder, names) == results(undisturbed, names)


def test_a_run_that_cannot_train_is_told_with_its_log(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(ladder.read_text())
    values["families"] = {"bad": {"data": {"path": str(tmp_path / "nowhere")}}, "dense": {}}
    values["sizes"] = {"a": values["sizes"]["a"]}
    bad = ladder.with_name("bad.yaml")
    bad.write_text(yaml.safe_dump(values))
    assert main(["scale", "run", str(bad), "--runs-dir", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.count("bad-a-s0 failed with exit code 4") == 2
    assert "holds no prepared data" in told
    assert "1 done, 1 failed; failed: bad-a-s0" in told

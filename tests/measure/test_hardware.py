from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import factorlm
from factorlm.measure import environment, hardware


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_environment_is_json_and_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["factorlm"] == factorlm.__version__
    assert found["torch"] == torch.__version__
    assert found["num_threads"] == torch.get_num_threads()
    assert found["num_processes"] == 3
    assert found["gpu"] is None
    assert 1 <= found["num_cpu_cores"] <= (os.cpu_count() or 1)
    assert found["cpu"]


def test_cpu_name_is_read_from_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Some CPU: 9000\n")
    monkeypatch.setattr(hardware, "_CPUINFO", path)
    assert hardware.cpu_name() == "Some CPU: 9000"
    path.write_text("processor\t: 0\n")
    assert hardware.cpu_name()


def test_source_commit_only_of_tracked_source(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert hardware.source_commit.__wrapped__(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "second")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag does not take the commit's place")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert hardware.source_commit.__wrapped__(package) == commit
    (package / "__init__.py").write_text("x = 1\n")
    assert hardware.source_commit.__wrapped__(package) == f"{commit}-dirty"


def test_source_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.source_commit.__wrapped__() is None

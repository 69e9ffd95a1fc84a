"""Every script in ``examples/`` runs as its docstring says. The demo has a test of its own."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "demo.py")


def test_there_are_examples() -> None:
    assert len(SCRIPTS) >= 3


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_docstring_says_how_to_run_it(path: Path) -> None:
    docstring = runpy.run_path(str(path))["__doc__"]
    assert f"    python examples/{path.name}" in docstring


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_runs_in_a_process_of_its_own_without_network(path: Path, tmp_path: Path) -> None:
    """An address that refuses every connection stands in for the network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | nowhere | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_the_plain_loop_learns() -> None:
    """From the 5.5 nats of a uniform guess over 256 bytes to under 3."""
    script = runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))
    with torch.random.fork_rng():
        losses = script["main"]()
    assert losses[0] == pytest.approx(5.55, abs=0.15)
    assert sum(losses[-5:]) / 5 < 3.0

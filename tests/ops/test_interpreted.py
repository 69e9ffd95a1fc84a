"""The Triton kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["interpreted_low_rank.py", "interpreted_linear_gelu.py"])
def test_in_the_interpreter(name: str) -> None:
    """All of ``name``, the first of which says why they are processes of their own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = Path(__file__).with_name(name)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)],
        env=env | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]

"""What the test run itself says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_why_browser_tests_are_skipped_is_said(tmp_path: Path) -> None:
    """Where no browser is on the path: a line a reason, with the number of tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_site_in_browser.py"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    *_, reason, count = done.stdout.strip().splitlines()
    assert reason.endswith(" skipped: no Chromium: apt-get install chromium")
    assert int(reason.split()[0]) == int(count.split()[0]) > 5
    assert " skipped in " in count


def test_what_installs_the_browser_says_where_it_cannot(tmp_path: Path) -> None:
    """``.ci/run`` as a user who may not install, with no browser on the path."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    start, _, _ = script.partition("make lint")
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", start.replace('cd "$(dirname "$0")/.."', "")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no Chromium, and no right to install it: its tests are skipped\n"

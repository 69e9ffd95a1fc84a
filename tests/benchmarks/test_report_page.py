"""The page whose opening is timed is the one that ``factorlm report`` makes, laws included."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from factorlm.cli.main import main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("report_page", BENCHMARKS / "report_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_timed_page_is_that_of_the_command(benchmark: Any, tmp_path: Path) -> None:
    benchmark.write_runs(tmp_path / "runs", 48, 20)  # four sizes of each family
    page, seconds = benchmark.make_page(tmp_path / "runs")
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    text = page.read_text(encoding="utf-8")
    assert text == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Straight lines in log–log" in text
    assert list(seconds) == ["gather_seconds", "fit_seconds", "write_seconds"]

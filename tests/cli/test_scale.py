"""``factorlm scale published``: text, JSON, figures, and no need of torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import RunWithoutTorch

from factorlm.cli.main import main


def test_runs_where_torch_cannot_be_imported(
    tmp_path: Path, run_without_torch: RunWithoutTorch
) -> None:
    done = run_without_torch("scale", "published")
    assert done.returncode == 0, done.stderr
    assert "the points do not say which is steeper" in done.stdout
    pictures = sorted(path.name for path in (tmp_path / "published").iterdir())
    assert pictures == ["scaling.png", "scaling.svg", "self_guided.png", "self_guided.svg"]
    assert done.stderr.count("figure: ") == 4


def test_the_text_says_what_the_points_support(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "published", "--no-plot"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["dense"]
    for slope in ("-0.0535", "-0.0546", "-0.0562"):
        assert slope in out
    assert "The order of the slopes turns at a shared entropy E of 1.67 nats." in out
    assert "The points do not identify E and gamma" in out
    assert out.count("no crossing within the data") == 2
    assert "-36 %" in out
    assert "91,147" in out


def test_markdown_has_tables_and_headings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "published", "--no-plot", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n## ") + out.startswith("## ") == 7
    assert "| dense | -0.0535 | ± 0.0049 |" in out


def test_json_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scale", "published", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["lines"]["dense"]["slope"] == pytest.approx(-0.0535, abs=5e-5)
    assert len(found["records"]) == 136
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_tables_still_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["scale", "published"]) == 0
    out, err = capsys.readouterr()
    assert "Wide and structured networks" in out
    assert "no figures: pictures need matplotlib: pip install 'factorlm[plots]'" in err
    assert main(["scale", "published", "-o", "figures"]) == 3


def test_a_wrong_level_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "published", "--no-plot", "--level", "95"]) == 3
    assert "level=95 must be above 0 and below 1" in capsys.readouterr().err

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.cli.conftest import RunWithoutTorch
from tests.report.studies import write_ladder

from factorlm.cli.main import main

ROOT = Path(__file__).parents[2]


def test_all_of_it_where_torch_cannot_be_imported(
    tmp_path: Path, run_without_torch: RunWithoutTorch
) -> None:
    """From copies of committed records, as on a laptop."""
    for topic in ("demo", "speed"):
        shutil.copytree(ROOT / "reports" / topic / "records", tmp_path / "records" / topic)
    command = ["report", "records", "-o", "report.html", "--figures", "figures", "--markdown"]
    done = run_without_torch(*command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {
        "curves.svg",
        "scaling.svg",
        "speed.svg",
    }
    assert "| demo_dense | dense |" in done.stdout
    files = (tmp_path / "records" / "speed").glob("*.jsonl")
    count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert f"report.html: 2 training runs, 2 families, {count} benchmarks (" in done.stderr


def test_laws_are_drawn_where_torch_cannot_be_imported(
    tmp_path: Path, run_without_torch: RunWithoutTorch
) -> None:
    write_ladder(tmp_path / "records", seeds=1)
    done = run_without_torch("report", "records", "-o", "report.html", "--markdown")
    assert done.returncode == 0, done.stderr
    assert "**E + A·C^−γ, shared E**" in done.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '"law":"straight lines"' in page
    assert "<caption>Straight lines in log–log</caption>" in page


def test_report_html_is_the_default(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tiny_run.path)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("report.html: 1 training run, 1 family (")
    assert "tiny" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_only_what_is_asked_for_is_written(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tiny_run.path), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| run | family |")
    assert main(["report", str(tiny_run.path), "--figures", "figures"]) == 0
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "figures" / "curves.png").exists()


def test_files_left_out_are_named(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "other.jsonl").write_text("{}\n\n")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs"), "-o", str(page)]) == 0
    assert "left out: " in capsys.readouterr().err
    assert "other.jsonl:1: not a record" in page.read_text(encoding="utf-8")


def test_refusals_write_nothing(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")
    records = tiny_run.path / "records.jsonl"
    for arguments, code, message in (
        ([str(tiny_run.path) + "x"], 4, "tinyx: no such file or folder. Did you mean 'tiny'?"),
        ([str(tmp_path)], 0, "page.html: 1 training run"),
        ([str(tiny_run.path / "model")], 4, "no records in it: no file below it ends in .jsonl"),
    ):
        assert main(["report", *arguments, "-o", str(page)]) == code
        assert message in capsys.readouterr().err
        assert (page.read_text() == "before") == bool(code)
        page.write_text("before")
    before = records.read_bytes()
    assert main(["report", str(tiny_run.path), "-o", str(records)]) == 3
    assert "the name of a page must end in .html" in capsys.readouterr().err
    assert records.read_bytes() == before

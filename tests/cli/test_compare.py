from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import RunWithoutTorch

from factorlm.cli.main import main
from factorlm.records import LayerValues, MonitorRecord, RecordFile


@pytest.fixture
def runs(tiny_run, tmp_path: Path) -> list[str]:
    """Two runs, the second a copy."""
    other = tmp_path / "runs" / "other"
    shutil.copytree(tiny_run.path, other)
    return [str(tiny_run.path), str(other)]


def test_runs_where_torch_cannot_be_imported(
    runs: list[str], tmp_path: Path, run_without_torch: RunWithoutTorch
) -> None:
    done = run_without_torch("compare", *runs)
    assert done.returncode == 0, done.stderr
    losses = [line.split() for line in done.stdout.splitlines() if line.startswith("best val")]
    assert losses == [["best", "validation", "loss", "4.0000", "4.0000", "+0.0000"]]
    picture = tmp_path / "runs" / "compare.png"
    assert f"loss curves: {picture}" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_alone_on_stdout(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["best_validation_loss"] for run in found] == [4.0, 4.0]
    assert not (Path(runs[0]).parent / "compare.png").exists()


def test_markdown_and_a_picture_elsewhere(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curves.svg"
    assert main(["compare", *runs, "--markdown", "--plot", str(picture)]) == 0
    assert "| parameters | 1,000 | 1,000 | 1.00x |" in capsys.readouterr().out
    assert picture.read_text().startswith("<?xml")


def test_without_matplotlib_the_table_still_comes(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", *runs]) == 0
    out, err = capsys.readouterr()
    assert "perplexity (best)" in out
    assert "no curves: pictures need matplotlib: pip install 'factorlm[plots]'" in err
    assert main(["compare", *runs, "--plot", "curves.png"]) == 3


def test_monitors_have_a_picture_beside_that_of_the_losses(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = LayerValues(factor_norms={"V": 1.0}, product_rms=1.0, change_rms=0.1, grad_norm=1.0)
    record = MonitorRecord(step=2, guide_alpha=None, layers={"model.layers.1.c_fc": values})
    RecordFile(Path(runs[1]) / "records.jsonl").append(record)
    assert main(["compare", *runs, "--plot", str(tmp_path / "x.png")]) == 0
    beside = tmp_path / "x_monitors.png"
    assert f"monitors: {beside}" in capsys.readouterr().err
    assert beside.read_bytes().startswith(b"\x89PNG")


def test_no_plot(runs: list[str]) -> None:
    assert main(["compare", *runs, "--no-plot"]) == 0
    assert not (Path(runs[0]).parent / "compare.png").exists()


def test_all_of_a_folder_of_runs(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell expands ``runs/*``, once a picture is there."""
    assert main(["compare", *runs]) == 0
    first = capsys.readouterr().out
    everything = sorted(str(path) for path in Path(runs[0]).parent.iterdir())
    assert len(everything) == 3
    assert main(["compare", *everything]) == 0
    assert sorted(capsys.readouterr().out) == sorted(first)


def test_missing_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", runs[0], runs[0] + "x"]) == 4
    assert "tinyx: no such run. Did you mean 'tiny'?" in capsys.readouterr().err

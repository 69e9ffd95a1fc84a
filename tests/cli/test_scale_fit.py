"""``factorlm scale fit``: text, JSON, figures, refusals, and no need of torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import RunWithoutTorch
from tests.report.studies import ENTROPY, GAMMAS, write_grid, write_ladder, write_run

from factorlm.cli.main import main


def test_runs_where_torch_cannot_be_imported(
    tmp_path: Path, run_without_torch: RunWithoutTorch
) -> None:
    write_ladder(tmp_path / "runs")
    done = run_without_torch("scale", "fit", "runs")
    assert done.returncode == 0, done.stderr
    assert "low_rank_32 against dense: slopes differ by" in done.stdout
    assert "With E fitted, at loss " in done.stdout
    pictures = sorted(path.name for path in (tmp_path / "fits").iterdir())
    assert pictures == ["scaling.png", "scaling.svg"]
    assert done.stderr.count("figure: ") == 2


def test_the_text_has_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ladder(tmp_path)
    assert main(["scale", "fit", str(tmp_path), "--no-plot"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    sizes = [line.split()[:2] for line in lines[4:14]]
    assert sizes == [[f, f"w{n}"] for f in ("dense", "low_rank_32") for n in range(1, 6)]
    for title in (
        "Last validation loss at training FLOPs",
        "Straight lines in log–log",
        "One entropy E for all: loss = E + A·C^−γ",
        "FLOPs for equal loss, by straight lines",
        "The same by laws that share E",
        "The largest size, predicted from the smaller ones",
        "Bootstrap, each family by itself",
        "What the points do not say",
    ):
        assert lines.count(title) == 1, title
    assert "Of that, " in out
    assert "crossing at " in out
    assert "Not of dense, low_rank_32: it takes 8 sizes with 3 seeds each." in out
    assert "FLOPs: executed, head included." in out


def test_json_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ladder(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    command = ["scale", "fit", "runs", "--json", "--level", "0.99", "--count", "model_flops"]
    assert main(command) == 0
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    law = found["laws"]["dense"]
    assert law["gamma_low"] < GAMMAS["dense"] < law["gamma_high"]
    assert law["E_low"] < ENTROPY < law["E_high"]
    assert law["level"] == 0.99
    assert found["count"] == "model_flops"
    assert found["base"] == "dense"
    point = found["families"]["dense"][0]
    assert point["flops"] == pytest.approx(6 * 3e4 * 6e5)
    assert point["runs"] == ["dense-w1-s0", "dense-w1-s1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_markdown_of_a_grid_has_the_best_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = lambda params, tokens, flops: 1.7 + 400 * params**-0.34 + 400 * tokens**-0.28  # noqa: E731
    write_grid(tmp_path, law, noise=0.001)
    command = ["scale", "fit", str(tmp_path), "--no-plot", "--markdown", "--budget", "1e16"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "## Parameters N and tokens D: loss = E + A·N^−α + B·D^−β (95 %)" in out
    assert "- dense, 1.000e16 FLOPs: best with " in out
    assert "FLOPs are 6.60·N·D (6.60 to 6.60 over the points)." in out


def test_another_base_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ladder(tmp_path / "runs", seeds=1)
    figures = tmp_path / "figures"
    command = ["scale", "fit", str(tmp_path / "runs"), "--base", "low_rank_32", "-o", str(figures)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "dense against low_rank_32: slopes differ by +" in out
    assert f"figure: {figures / 'scaling.png'}" in err
    assert (figures / "scaling.svg").read_text().count("training FLOPs, executed") >= 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--base", "dens"], 3, "base='dens' is none of the fitted families, dense, low_rank_32."),
        (["--level", "95"], 3, "level=95 must be above 0 and below 1"),
        (["--budget", "nan"], 3, "budget=nan must be finite and above 0"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    write_ladder(tmp_path, seeds=1)
    assert main(["scale", "fit", str(tmp_path), "--no-plot", *options]) == code
    assert message in capsys.readouterr().err


def test_runs_that_give_nothing_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"num_params": 1e5, "num_tokens": 2e6, "flops": 1e12, "loss": 4.0}
    write_run(tmp_path / "runs", "a", **options)  # type: ignore[arg-type]
    write_run(tmp_path / "runs", "b", **options, finished=False)  # type: ignore[arg-type]
    (tmp_path / "runs" / "odd.jsonl").write_text("{}\n{}\n")
    assert main(["scale", "fit", str(tmp_path / "runs")]) == 4
    err = capsys.readouterr().err
    assert "left out: " in err
    assert "odd.jsonl:1: not a record" in err
    assert "no family has two sizes to fit" in err
    assert "Left out, not finished: b." in err
    assert "dense has one size, 83.33K; a law needs two." in err
    assert main(["scale", "fit", str(tmp_path / "rums")]) == 4
    assert "no such file or folder. Did you mean 'runs'?" in capsys.readouterr().err


def test_without_matplotlib_the_tables_still_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ladder(tmp_path / "runs", seeds=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["scale", "fit", "runs"]) == 0
    out, err = capsys.readouterr()
    assert "Straight lines in log–log" in out
    assert "no figures: pictures need matplotlib" in err
    assert main(["scale", "fit", "runs", "-o", "figures"]) == 3

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.report.studies import write_ladder, write_run

from factorlm.errors import StorageError
from factorlm.report import ScalingCurve, gather, paper, report_fits, write_figures


def test_every_chart_of_the_page_is_a_png_and_an_svg(study: Path, tmp_path: Path) -> None:
    lines = write_figures(gather([study]), tmp_path / "new" / "figures")
    names = {"curves", "scaling", "speed", "monitors_1"}
    files = {path.name: path for path in (tmp_path / "new" / "figures").iterdir()}
    assert files.keys() == {f"{name}{kind}" for name in names for kind in (".png", ".svg")}
    for name, path in files.items():
        magic = b"\x89PNG" if name.endswith("png") else b"<?xml"
        assert path.read_bytes().startswith(magic)
    assert lines == [
        f"{tmp_path / 'new' / 'figures' / name}.png and .svg"
        for name in ("curves", "scaling", "speed", "monitors_1")
    ]


def test_benchmarks_in_which_nothing_varies_are_named(study: Path, tmp_path: Path) -> None:
    lines = (study / "speed.jsonl").read_text().splitlines()
    (study / "speed.jsonl").write_text(lines[0] + "\n")
    said = write_figures(gather([study / "speed.jsonl"]), tmp_path / "figures")
    assert said == [
        "not in the picture of speed: kernel, fp32: nothing to draw: neither the tokens nor the "
        "width vary"
    ]


def test_lines_of_the_picture_are_those_of_the_page(study: Path) -> None:
    report = gather([study])
    tokens, flops, seconds = paper._draw_curves(report).axes
    for axes, name in ((tokens, "num_tokens"), (flops, "executed_flops"), (seconds, "seconds")):
        lines = axes.get_lines()
        for index, run in enumerate(report.runs):
            training, validation = lines[2 * index : 2 * index + 2]
            np.testing.assert_array_equal(training.get_xdata(), getattr(run.training, name))
            np.testing.assert_array_equal(training.get_ydata(), run.training.smoothed)
            np.testing.assert_array_equal(validation.get_ydata(), run.validation.loss)
    assert flops.get_xlabel() == "FLOPs as run"


def test_points_fits_and_bands_of_scaling(study: Path) -> None:
    report = gather([study])
    compute = [1e5, 1e6]
    law = ScalingCurve(family="dense", compute=compute, loss=[4, 3], low=[3.9, 2.9], high=[5, 4])
    (axes,) = paper._draw_scaling(report, [law, ScalingCurve(
        family="Chinchilla", compute=compute, loss=[3, 2])]).axes  # fmt: skip
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()[:4]]
    assert points == [
        (run.metrics["executed_flops"], run.metrics["last_validation_loss"]) for run in report.runs
    ]
    hollow, *solid = [line.get_markerfacecolor() for line in axes.get_lines()[:4]]
    assert hollow == "none"
    assert "none" not in solid
    fit, other = axes.get_lines()[4:]
    assert list(fit.get_ydata()) == [4, 3]
    assert fit.get_color() == axes.get_lines()[1].get_color(), "a fit has its family's colour"
    assert other.get_color() != fit.get_color()
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (2.9, 5)


def test_the_first_law_is_drawn_and_tuning_runs_are_crosses(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path / "ladder", seeds=1)
    labels = {"ladder": "books", "family": "dense", "size": "w2"}
    options = {"num_params": 1e5, "num_tokens": 2e6, "flops": 2e12, "loss": 5.0}
    for stage in ("tune", "calibration"):
        write_run(folder, stage, **options, labels=labels | {"stage": stage})
    report = gather([folder])
    fits = report_fits(report)
    drawn = paper.first_law(fits)
    assert [curve.law for curve in drawn] == [fits.laws[0]] * 2
    (axes,) = paper._draw_scaling(report, drawn).axes
    assert axes.get_title(loc="left") == fits.laws[0]
    assert [line.get_marker() for line in axes.get_lines()].count("x") == 1
    assert len(axes.get_lines()) == 10 + 1 + 2
    assert [list(line.get_ydata()) for line in axes.get_lines()[-2:]] == [c.loss for c in drawn]


def test_a_folder_that_cannot_be_made(study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot make"):
        write_figures(gather([study]), tmp_path / "file")

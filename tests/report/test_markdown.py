from __future__ import annotations

from pathlib import Path

from factorlm.report import gather, report_markdown


def test_tables_of_runs_and_benchmarks(study: Path) -> None:
    runs, note, *benchmarks = report_markdown(gather([study])).split("\n\n")
    header, rule, *rows = [line.strip("| ").split(" | ") for line in runs.splitlines()]
    assert header[:4] == ["run", "family", "parameters", "FFN parameters"]
    assert "generation tokens/s" not in header
    assert rule[0] == ":--"
    assert [row[0] for row in rows] == ["blocks *", "dense-0", "dense-1", "low"]
    column = header.index("best validation loss")
    losses = [run.metrics["best_validation_loss"] for run in gather([study]).runs]
    assert [row[column] for row in rows] == [f"{loss:.4f}" for loss in losses]
    assert note == "\\* unfinished"
    assert benchmarks[0] == "**kernel  64x256  1 token  fp32**"
    assert "| low_rank | 1.000 | 0.100 | 2.00x | 3.20x |" in benchmarks[1]


def test_a_bar_in_a_name_stays_in_its_cell(write_run) -> None:
    text = report_markdown(gather([write_run("a|b")]))
    assert "| a\\|b |" in text

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from factorlm.records import BenchmarkRecord, RecordFile
from factorlm.report import gather, read_run
from factorlm.report.payload import page_json, speed_panels


def unpacked(text: str, rows: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8").reshape(rows, -1)


def test_curves_hold_the_recorded_numbers_bit_for_bit(study: Path) -> None:
    report = gather([study])
    data = json.loads(page_json(report))
    assert data["families"] == list(report.families)
    for entry, run in zip(data["runs"], report.runs, strict=True):
        recorded = read_run(run.path)
        assert data["families"][entry["family"]] == run.family
        columns = unpacked(entry["training"]["columns"], 7)
        assert columns.shape[1] == entry["training"]["points"] == len(recorded.steps)
        assert list(columns[0]) == [step.step for step in recorded.steps]
        assert list(columns[3]) == [step.executed_flops for step in recorded.steps]
        assert list(columns[5]) == [step.loss for step in recorded.steps]
        evaluated = unpacked(entry["validation"]["columns"], 7)
        assert list(evaluated[5]) == [record.loss for record in recorded.evals]
        assert recorded.last is not None
        assert (entry["compute"], entry["loss"]) == (recorded.executed_flops, recorded.last.loss)


def test_what_is_not_finite_is_no_json_and_no_number(write_run) -> None:
    run = write_run("a", losses=[3.0, float("nan"), float("inf"), 2.0], num_evals=4)
    (entry,) = json.loads(page_json(gather([run])))["runs"]
    assert list(np.isfinite(unpacked(entry["training"]["columns"], 7)[5])) == [
        True, False, False, True,
    ]  # fmt: skip


def test_monitors_are_layers_by_steps(study: Path) -> None:
    report = gather([study])
    (entry,) = json.loads(page_json(report))["monitors"]
    run = report.runs[entry["run"]]
    assert run.label == "low"
    panels = {p["label"]: unpacked(p["values"], len(entry["layers"])) for p in entry["panels"]}
    assert list(panels) == [
        "spectral norm of V",
        "spectral norm of U",
        "RMS of change / RMS of product",
    ]
    for row, name in enumerate(entry["layers"]):
        norms = [record.layers[name]["factor_norms"]["V"] for record in run.summary.monitors]
        assert list(panels["spectral norm of V"][row]) == norms
    assert entry["alpha"] == [record.guide_alpha for record in run.summary.monitors]
    assert entry["spikes"] == [3]


def test_speed_has_a_line_a_case_and_other_setting(study: Path, tmp_path: Path) -> None:
    (panel,) = speed_panels(gather([study]).benchmarks)
    assert (panel["title"], panel["axis"]) == ("kernel, fp32", "tokens")
    dense, low_rank = panel["lines"]
    assert dense["x"] == low_rank["x"] == [1.0, 64.0]
    assert low_rank["median_ms"] == [1.0, 64.0]
    assert (dense["ideal"], low_rank["ideal"]) == ([None, None], [3.2, 3.2])

    records = [r for r in RecordFile(study / "speed.jsonl") if isinstance(r, BenchmarkRecord)]
    wider = [
        BenchmarkRecord(**(vars(r) | {"settings": r.settings | {"shape": [128, 512]}}))
        for r in records
    ]
    (panel,) = speed_panels([*records, *wider])
    assert [line["name"] for line in panel["lines"]] == [
        "dense, width 64",
        "dense, width 128",
        "low_rank, width 64",
        "low_rank, width 128",
    ]
    elsewhere = [BenchmarkRecord(**(vars(r) | {"environment": {"gpu": "H100"}})) for r in records]
    assert [panel["title"] for panel in speed_panels([*records, *elsewhere])] == [
        "kernel, fp32, Abacus, 2 threads",
        "kernel, fp32, H100",
    ]
    assert speed_panels(records[:1]) == []

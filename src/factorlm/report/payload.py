"""What the charts of a page draw, as JSON: numbers as float64 in base64, exactly as computed."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from factorlm.records import BenchmarkRecord
from factorlm.report.compare import RunSummary
from factorlm.report.curves import LossCurve
from factorlm.report.monitors import panels_of
from factorlm.report.points import stage_of
from factorlm.report.reading import Report, ReportRun
from factorlm.report.speed import AXES, axis_of, other_of, speed_groups, value_of
from factorlm.report.tables import Table, format_tick


@dataclass(frozen=True, kw_only=True)
class ScalingCurve:
    """A fitted law to draw over the points of a family, and its band."""

    family: str
    """As ``ReportRun.family`` says it, or any other name: then it has a colour of its own."""
    compute: Sequence[float]
    """Executed FLOPs, ascending."""
    loss: Sequence[float]
    """Nats per token at each of ``compute``."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """The band at each of ``compute``; empty without one."""
    law: str = "fit"
    """Which law it is; the page has a choice between them."""


@dataclass(frozen=True, kw_only=True)
class ScalingFits:
    """What a report says of fitted laws."""

    curves: Sequence[ScalingCurve] = ()
    """The law of the first is the one that is drawn first, and alone where there is no choice."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """Title to the numbers of the fits."""
    notes: Sequence[str] = ()
    """What is not fitted and why, in plain sentences."""

    @property
    def laws(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(curve.law for curve in self.curves))


NO_FITS = ScalingFits()


def page_json(report: Report, laws: Sequence[ScalingCurve] = ()) -> str:
    """The data of every chart. No ``<`` is in it, so that no text can end a script element."""
    families = list(dict.fromkeys([*report.families, *(law.family for law in laws)]))
    values = {
        "families": families,
        "runs": [_run(run, families) for run in report.runs],
        "laws": [dataclasses.asdict(law) for law in laws],
        "speed": speed_panels(report.benchmarks),
        "monitors": [
            _monitors(index, run.summary)
            for index, run in enumerate(report.runs)
            if run.summary.monitors
        ],
    }
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _run(run: ReportRun, families: Sequence[str]) -> dict[str, Any]:
    return {
        "label": run.label,
        "family": families.index(run.family),
        "finished": run.summary.is_finished,
        "stage": stage_of(run),
        "training": _curve(run.training),
        "validation": _curve(run.validation),
        "compute": run.metrics["executed_flops"],
        "loss": run.metrics["last_validation_loss"],
    }


def _curve(curve: LossCurve) -> dict[str, Any]:
    return {"points": len(curve.loss), "columns": packed(curve.columns)}


def packed(values: np.ndarray) -> str:
    """Rows after each other, little-endian float64, in base64."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f8").tobytes()).decode("ascii")


def speed_panels(records: Sequence[BenchmarkRecord]) -> list[dict[str, Any]]:
    """For each benchmark, dtype, pass and hardware in which tokens or width vary: its lines."""
    panels = []
    for key, found in speed_groups(records).items():
        axis = axis_of(found)
        if axis is not None:
            panels.append(
                {"title": ", ".join(key), "axis": AXES[axis], "lines": _speed_lines(found, axis)}
            )
    return panels


def _speed_lines(records: Sequence[BenchmarkRecord], axis: str) -> list[dict[str, Any]]:
    """A line a case and value of the setting that is not on the axis."""
    (other_axis,) = (name.removeprefix("num_") for name in AXES if name != axis)
    others = sorted({other_of(record, axis) for record in records})
    lines = []
    for case in dict.fromkeys(name for record in records for name in record.cases):
        for other in others:
            found = [r for r in records if case in r.cases and other_of(r, axis) == other]
            found.sort(key=lambda record: value_of(record, axis))
            cases = [record.cases[case] for record in found]
            suffix = f", {other_axis} {format_tick(other)}" if len(others) > 1 else ""
            lines.append(
                {
                    "case": case,
                    "name": case + suffix,
                    "dash": others.index(other),
                    "x": [value_of(record, axis) for record in found],
                    "median_ms": [values["median_ms"] for values in cases],
                    "spread_ms": [values["spread_ms"] for values in cases],
                    "speedup": [values["speedup"] for values in cases],
                    "ideal": [values["ideal_speedup"] for values in cases],
                }
            )
    return [line for line in lines if line["x"]]


def _monitors(index: int, run: RunSummary) -> dict[str, Any]:
    """Every panel of the monitors' picture, layers by steps, and the guide's share."""
    layers = list(run.monitors[-1].layers)
    panels = {
        panel.label: np.array(
            [
                [panel.value(r.layers[name]) if name in r.layers else None for r in run.monitors]
                for name in layers
            ],
            dtype=float,
        )
        for panel in panels_of(run)
    }
    return {
        "run": index,
        "layers": layers,
        "steps": [record.step for record in run.monitors],
        "panels": [{"label": label, "values": packed(found)} for label, found in panels.items()],
        "alpha": [record.guide_alpha for record in run.monitors],
        "spikes": [event.step for event in run.spikes],
    }

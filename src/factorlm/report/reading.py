"""Records of many runs and benchmarks, read one file at a time and thinned to what a page draws."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from factorlm.errors import DataError, did_you_mean
from factorlm.records import RECORDS_FILE, BenchmarkRecord, RecordFile
from factorlm.report.compare import METRICS, RunSummary, distinct_labels, finite, summarize
from factorlm.report.curves import LossCurve, loss_curves
from factorlm.report.families import family_labels

T = TypeVar("T")

MAX_POINTS, MIN_POINTS = 500, 100
"""Of one training curve."""
ALL_POINTS = 60_000
"""Of all training curves of a page, while each has its ``MIN_POINTS``."""
MAX_MONITORED, MIN_MONITORED = 200, 10
"""Steps of one run whose monitors are drawn."""
ALL_MONITORED = 200_000
"""Layers times steps of all runs, likewise."""


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run as a report shows it."""

    label: str
    """Its name; where several runs have that name, its path."""
    path: Path
    family: str
    """Runs of one family share a colour and are shown and hidden together."""
    summary: RunSummary
    """With the steps and monitors that are drawn; the evaluations are all there."""
    metrics: dict[str, float | None]
    """By the keys of ``METRICS``, exact, from all steps; None for what is not known or finite."""
    num_steps_done: int
    training: LossCurve
    validation: LossCurve


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a page, its figures and its Markdown are made from."""

    runs: tuple[ReportRun, ...]
    benchmarks: tuple[BenchmarkRecord, ...]
    left_out: tuple[str, ...]
    """Files of searched folders that could not be used, each with the reason."""

    @property
    def families(self) -> tuple[str, ...]:
        """In the order of the runs."""
        return tuple(dict.fromkeys(run.family for run in self.runs))


def gather(paths: Sequence[str | os.PathLike[str]]) -> Report:
    """Read runs and benchmarks from record files, run folders, and folders that hold such.

    A folder is searched for ``*.jsonl`` at any depth; what cannot be used there is left out and
    named in ``left_out``. What is named itself has to be good: raises ``DataError`` naming path,
    line and rule for a path that is not there, a damaged line, a file without a step or
    benchmark, and if nothing at all was found.
    """
    files = find_files(paths)
    max_points = min(MAX_POINTS, max(MIN_POINTS, ALL_POINTS // max(1, len(files))))
    runs: list[ReportRun] = []
    benchmarks: list[BenchmarkRecord] = []
    left_out: list[str] = []
    for path, is_named in files.items():
        try:
            run, found = _read(path, max_points)
        except DataError as error:
            if is_named:
                raise
            left_out.append(str(error))
            continue
        runs += [run] if run is not None else []
        benchmarks += found
    if not runs and not benchmarks:
        raise DataError("\n".join(["no run with a step and no benchmark found", *left_out]))
    return Report(
        runs=tuple(_named(_with_fewer_monitors(runs))),
        benchmarks=tuple(benchmarks),
        left_out=tuple(left_out),
    )


def find_files(paths: Sequence[str | os.PathLike[str]]) -> dict[Path, bool]:
    """The record files that ``paths`` mean, each once, and whether it was named itself."""
    found: dict[Path, bool] = {}
    for path in map(Path, paths):
        for file, is_named in _files_of(path):
            found[file] = found.get(file, False) or is_named
    return found


def _files_of(path: Path) -> Iterator[tuple[Path, bool]]:
    if path.is_file():
        yield path, True
    elif (path / RECORDS_FILE).is_file():
        yield path / RECORDS_FILE, True
    elif path.is_dir():
        inside = sorted(file for file in path.rglob("*.jsonl") if file.is_file())
        if not inside:
            raise DataError(f"{path}: no records in it: no file below it ends in .jsonl")
        yield from ((file, False) for file in inside)
    else:
        siblings = [sibling.name for sibling in path.parent.glob("*")]
        raise DataError(f"{path}: no such file or folder.{did_you_mean(path.name, siblings)}")


def _read(path: Path, max_points: int) -> tuple[ReportRun | None, list[BenchmarkRecord]]:
    """The run and the benchmarks of one file. Raises ``DataError`` where there is neither."""
    try:
        records = list(RecordFile(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    benchmarks = [record for record in records if isinstance(record, BenchmarkRecord)]
    summary = summarize(records)
    if summary is None and not benchmarks:
        raise DataError(f"{path}: its records hold no training step and no benchmark yet")
    return (_thinned(summary, path, max_points) if summary else None), benchmarks


def _thinned(summary: RunSummary, path: Path, max_points: int) -> ReportRun:
    training, validation, kept = loss_curves(summary, max_points)
    steps = tuple(summary.steps[index] for index in kept)
    return ReportRun(
        label=summary.label,
        path=path,
        family="",
        summary=dataclasses.replace(
            summary, steps=steps, monitors=every_kth(summary.monitors, MAX_MONITORED)
        ),
        metrics={metric.key: finite(metric.value(summary)) for metric in METRICS},
        num_steps_done=summary.steps[-1].step,
        training=training,
        validation=validation,
    )


def every_kth(items: Sequence[T], limit: int) -> tuple[T, ...]:
    """At most ``limit`` of ``items``, equally far apart, the last one among them."""
    stride = -(-len(items) // limit)
    return tuple(items[(len(items) - 1) % stride :: stride]) if items else ()


def _with_fewer_monitors(runs: Sequence[ReportRun]) -> list[ReportRun]:
    """So many that all runs' together stay small enough for a page."""
    num_layers = sum(len(run.summary.monitors[-1].layers) for run in runs if run.summary.monitors)
    limit = max(MIN_MONITORED, min(MAX_MONITORED, ALL_MONITORED // max(1, num_layers)))
    fewer = ((run, every_kth(run.summary.monitors, limit)) for run in runs)
    return [
        dataclasses.replace(run, summary=dataclasses.replace(run.summary, monitors=monitors))
        for run, monitors in fewer
    ]


def _named(runs: Sequence[ReportRun]) -> Iterator[ReportRun]:
    """With what can only be said beside the other runs: label and family."""
    labels = distinct_labels([run.label for run in runs], [run.path for run in runs])
    families = family_labels([run.summary.run for run in runs])
    for run, label, family in zip(runs, labels, families, strict=True):
        summary = dataclasses.replace(run.summary, label=label)
        yield dataclasses.replace(run, label=label, family=family, summary=summary)

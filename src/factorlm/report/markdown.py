"""A report as Markdown tables, for READMEs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from factorlm.report.benchmarks import benchmark_table, benchmark_title
from factorlm.report.compare import METRICS, UNFINISHED
from factorlm.report.facts import hardware_label
from factorlm.report.payload import NO_FITS, ScalingFits
from factorlm.report.reading import Report, ReportRun
from factorlm.report.tables import Table


def report_markdown(report: Report, fits: ScalingFits = NO_FITS) -> str:
    """The table of runs, those of ``fits`` and one of each benchmark, each under its title."""
    return "\n\n".join(_blocks(report, fits))


def _blocks(report: Report, fits: ScalingFits) -> Iterator[str]:
    if report.runs:
        yield runs_table(report.runs).markdown()
    if any(not run.summary.is_finished for run in report.runs):
        yield f"\\{UNFINISHED.strip()} unfinished"
    for title, table in fits.tables.items():
        yield f"**{title}**"
        yield table.markdown()
    if fits.tables and fits.notes:
        yield "\n".join(f"- {note}" for note in fits.notes)
    for record in report.benchmarks:
        yield f"**{benchmark_title(record)}**"
        yield benchmark_table(record).markdown()


def runs_table(runs: Sequence[ReportRun]) -> Table:
    """A row a run; metrics that no run has are left out."""
    metrics = [m for m in METRICS if any(run.metrics[m.key] is not None for run in runs)]
    rows = []
    for run in runs:
        values = [(metric, run.metrics[metric.key]) for metric in metrics]
        rows.append(
            (
                run.label + ("" if run.summary.is_finished else UNFINISHED),
                run.family,
                *("–" if value is None else metric.write(value) for metric, value in values),
                hardware_label(run.summary.run.environment),
            )
        )
    header = ("run", "family", *(metric.title for metric in metrics), "hardware")
    return Table(header=header, rows=tuple(rows))

"""Records to tables and pictures; reads records only and needs no torch."""

from factorlm.report.compare import (
    RunSummary,
    comparison_json,
    comparison_notes,
    comparison_table,
    comparison_tables,
    read_run,
    read_runs,
)
from factorlm.report.figures import plot_losses
from factorlm.report.monitors import plot_monitors
from factorlm.report.tables import Table

__all__ = [
    "RunSummary",
    "Table",
    "comparison_json",
    "comparison_notes",
    "comparison_table",
    "comparison_tables",
    "plot_losses",
    "plot_monitors",
    "read_run",
    "read_runs",
]

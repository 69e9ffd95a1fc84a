"""Records to tables, pictures and a page; reads records only and needs no torch."""

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
from factorlm.report.laws import report_fits
from factorlm.report.markdown import report_markdown
from factorlm.report.monitors import plot_monitors
from factorlm.report.page import write_page
from factorlm.report.paper import write_figures
from factorlm.report.payload import ScalingCurve, ScalingFits
from factorlm.report.reading import Report, ReportRun, gather
from factorlm.report.tables import Table

__all__ = [
    "Report",
    "ReportRun",
    "RunSummary",
    "ScalingCurve",
    "ScalingFits",
    "Table",
    "comparison_json",
    "comparison_notes",
    "comparison_table",
    "comparison_tables",
    "gather",
    "plot_losses",
    "plot_monitors",
    "read_run",
    "read_runs",
    "report_fits",
    "report_markdown",
    "write_figures",
    "write_page",
]

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
from factorlm.report.fit_text import fits_json, fits_text, plot_fits
from factorlm.report.fits import StudyFits, fit_study
from factorlm.report.laws import report_fits
from factorlm.report.markdown import report_markdown
from factorlm.report.monitors import plot_monitors
from factorlm.report.page import write_page
from factorlm.report.paper import write_figures
from factorlm.report.payload import ScalingCurve, ScalingFits
from factorlm.report.points import Study, study_of
from factorlm.report.reading import Report, ReportRun, gather
from factorlm.report.tables import Table

__all__ = [
    "Report",
    "ReportRun",
    "RunSummary",
    "ScalingCurve",
    "ScalingFits",
    "Study",
    "StudyFits",
    "Table",
    "comparison_json",
    "comparison_notes",
    "comparison_table",
    "comparison_tables",
    "fit_study",
    "fits_json",
    "fits_text",
    "gather",
    "plot_fits",
    "plot_losses",
    "plot_monitors",
    "read_run",
    "read_runs",
    "report_fits",
    "report_markdown",
    "study_of",
    "write_figures",
    "write_page",
]

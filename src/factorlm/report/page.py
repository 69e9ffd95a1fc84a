"""The report as one HTML file that needs no network: text and tables here, charts by Plotly."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import factorlm
from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.report.benchmarks import bars_table, benchmark_table, benchmark_title
from factorlm.report.compare import METRICS
from factorlm.report.facts import (
    data_notes,
    differences,
    flat,
    hardware_label,
    recipe_file,
    recipe_yaml,
    reproduce_commands,
)
from factorlm.report.payload import NO_FITS, ScalingFits, page_json, speed_panels
from factorlm.report.points import TUNE, stage_of
from factorlm.report.reading import MAX_MONITORED, Report, ReportRun
from factorlm.report.tables import format_seconds
from factorlm.storage import atomic_write_text

ASSETS = resources.files("factorlm.report") / "assets"
SCRIPTS = ("common.js", "charts.js", "tables.js")
SUFFIXES = (".html", ".htm")
NUM_COLORS = 7
"""Series colours that page.css has; further families are dashed."""
PLURALS = {"family": "families"}
FIRST_COLUMNS = ("best_validation_loss", "perplexity", "bits_per_byte")
"""What a reader looks for; the other metrics follow in their own order."""
UNITS = {
    "best_validation_loss": "nats per token",
    "last_validation_loss": "nats per token",
    "executed_flops": "as run",
    "training_flops": "papers' convention",
}


def write_page(report: Report, path: str | os.PathLike[str], fits: ScalingFits = NO_FITS) -> Path:
    """Write the page to ``path``, whole or not at all; ``fits`` go with the scaling chart.

    Raises ``ConfigError`` for a name that does not end in .html and where Plotly or Jinja2 is
    missing, and ``StorageError`` where the file cannot be written.
    """
    path = Path(path)
    check_page_name(path)
    atomic_write_text(path, render_page(report, fits))
    return path


def check_page_name(path: Path) -> None:
    """Raise ``ConfigError`` unless ``path`` names a page: so no records are written over."""
    check(path.suffix in SUFFIXES, f"{path}: the name of a page must end in {SUFFIXES[0]}")


def render_page(report: Report, fits: ScalingFits = NO_FITS) -> str:
    """The page. Equal records give equal pages."""
    jinja2, plotly = _import_jinja(), _plotly_script()
    own = "\n".join(_asset(name) for name in SCRIPTS)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text: str = environment.get_template("page.html").render(
        title=title_of(report),
        version=factorlm.__version__,
        policy=_policy([plotly, own]),
        css=_asset("page.css"),
        scripts=[plotly, own],
        data=page_json(report, fits.curves),
        report=report,
        families=_families(report),
        columns=_columns(report.runs),
        rows=[_row(index, run, report) for index, run in enumerate(report.runs)],
        comparisons=_differences(report.runs),
        facts=_facts(report.runs),
        notes=_notes(report.runs),
        recipes=[_recipe(run) for run in report.runs],
        monitored=[(i, run.label) for i, run in enumerate(report.runs) if run.summary.monitors],
        most_monitored=max(
            range(len(report.runs)),
            key=lambda index: len(report.runs[index].summary.monitors),
            default=None,
        ),
        max_monitored=MAX_MONITORED,
        panels=speed_panels(report.benchmarks),
        bars=bars_table(report.benchmarks),
        benchmarks=[(benchmark_title(r), benchmark_table(r)) for r in report.benchmarks],
        fits=fits,
        fit_choices=[*((law, law) for law in fits.laws), ("", "none")],
        has_tuning=any(stage_of(run) == TUNE for run in report.runs),
        num_points=max((len(run.training.loss) for run in report.runs), default=0),
    )
    return text


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _import_jinja() -> Any:
    try:
        import jinja2
    except ImportError:
        raise ConfigError("a page needs Jinja2: pip install 'factorlm[plots]'") from None
    return jinja2


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("a page needs Plotly: pip install 'factorlm[plots]'") from None
    script: str = get_plotlyjs()
    return script


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: these scripts and no other, nothing from the network."""
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _facts(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """What the page is about, in a line a fact."""
    known = [run for run in runs if run.metrics["best_validation_loss"] is not None]
    facts = []
    if known:
        best = min(known, key=lambda run: run.metrics["best_validation_loss"] or 0.0)
        loss = f"{best.metrics['best_validation_loss']:.4f} nats per token"
        facts.append(("lowest validation loss", f"{loss}, {best.label} ({best.family})"))
    if runs:
        hardware = (hardware_label(run.summary.run.environment) for run in runs)
        facts.append(("hardware", "; ".join(dict.fromkeys(filter(None, hardware)))))
        seconds = sum(run.metrics["train_seconds"] or 0.0 for run in runs)
        facts.append(("training time of all", format_seconds(seconds)))
        unfinished = sum(not run.summary.is_finished for run in runs)
        facts.append(("unfinished", f"{unfinished} of {len(runs)}"))
    return [(name, text) for name, text in facts if text]


def _notes(runs: Sequence[ReportRun]) -> list[str]:
    """What keeps losses from being compared, and loss spikes."""
    notes = data_notes([run.summary.run.config for run in runs])
    spiked = [f"{run.label} ({len(run.summary.spikes)})" for run in runs if run.summary.spikes]
    return notes + ([f"Loss spikes: {', '.join(spiked)}"] if spiked else [])


def title_of(report: Report) -> str:
    """What it is a report of: ``60 training runs, 18 families``."""
    counts = (
        (len(report.runs), "training run"),
        (len(report.families), "family"),
        (len(report.benchmarks), "benchmark"),
    )
    texts = [
        f"{n:,} {word if n == 1 else PLURALS.get(word, word + 's')}" for n, word in counts if n
    ]
    return ", ".join(texts)


def _families(report: Report) -> list[dict[str, Any]]:
    found = []
    for index, name in enumerate(report.families):
        runs = [run for run in report.runs if run.family == name]
        losses = [run.metrics["best_validation_loss"] for run in runs]
        known = [loss for loss in losses if loss is not None]
        found.append(
            {
                "index": index,
                "name": name,
                "color": index % NUM_COLORS,
                "dash": ("solid", "dashed", "dotted")[index // NUM_COLORS % 3],
                "count": len(runs),
                "best": f"{min(known):.4f}" if known else "",
            }
        )
    return found


def _columns(runs: Sequence[ReportRun]) -> list[dict[str, str]]:
    """The metrics that at least one run has."""
    return [
        {"key": metric.key, "title": metric.title, "unit": UNITS.get(metric.key, "")}
        for metric in sorted(METRICS, key=lambda metric: metric.key not in FIRST_COLUMNS)
        if any(run.metrics[metric.key] is not None for run in runs)
    ]


def _row(index: int, run: ReportRun, report: Report) -> dict[str, Any]:
    """Cells by column: what is read, and the exact value that it is sorted by."""
    cells = {}
    for metric in METRICS:
        value = run.metrics[metric.key]
        cells[metric.key] = (
            {"text": "–", "value": ""}
            if value is None
            else {"text": metric.write(value), "value": json.dumps(value)}
        )
    done, total = run.num_steps_done, run.summary.run.num_steps
    return {
        "index": index,
        "run": run,
        "family": report.families.index(run.family),
        "cells": cells,
        "steps": f"{done:,}" if run.summary.is_finished else f"{done:,} of {total:,}",
        "hardware": hardware_label(run.summary.run.environment),
    }


def _differences(runs: Sequence[ReportRun]) -> list[dict[str, Any]]:
    """Of the configs and of the environments: fields, and a row of texts for each run."""
    records = [run.summary.run for run in runs]
    found = []
    for title, values in (
        ("Recipes", [{**record.config, "name": ""} for record in records]),
        ("Environments", [record.environment for record in records]),
    ):
        fields = differences(values)
        rows = [[texts[index] for texts in fields.values()] for index in range(len(runs))]
        found.append({"title": title, "fields": list(fields), "rows": rows})
    return found


def _recipe(run: ReportRun) -> dict[str, Any]:
    record = run.summary.run
    return {
        "label": run.label,
        "path": str(run.path),
        "file": recipe_file(record),
        "yaml": recipe_yaml(record),
        "commands": reproduce_commands(record),
        "is_dirty": str(record.environment.get("commit") or "").endswith("-dirty"),
        "has_commit": bool(record.environment.get("commit")),
        "environment": ", ".join(f"{k} {v}" for k, v in flat(record.environment).items()),
    }

"""The papers' scaling claims, tested and redrawn from their own points."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from factorlm.report.claims import claim_sentences, entropy_sentences
from factorlm.report.guided import guided_json, guided_table, plot_guided
from factorlm.report.scaling import (
    entropy_table,
    held_out_table,
    lines_table,
    multiplier_table,
    plot_scaling,
)
from factorlm.report.tables import Table, format_count, format_scientific
from factorlm.scaling import (
    Comparison,
    FitWarning,
    HeldOut,
    LineFit,
    PowerLawFit,
    SlopeDifference,
    compare_lines,
    fit_line,
    fit_power_laws,
    hold_out_largest,
    hold_out_largest_of,
    published_families,
    published_records,
    slopes_over_entropy,
    turning_entropy,
)
from factorlm.scaling.published import CERTAINTY
from factorlm.storage import storage_errors

BASE = "dense"
CHINCHILLA_ENTROPY = 1.69
"""E of Hoffmann et al., arXiv 2203.15556."""
ENTROPIES = (0.0, 0.5, 1.0, 1.5, CHINCHILLA_ENTROPY, 2.0)
DRAWN_ENTROPIES = tuple(0.2 * step for step in range(11))
SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Analysis:
    """All that is fitted to the points of the scaling figure."""

    lines: dict[str, LineFit]
    comparisons: dict[str, Comparison]
    laws: dict[str, PowerLawFit]
    over_entropy: dict[str, tuple[SlopeDifference, ...]]
    turning: dict[str, float]
    """Family to the E at which its order with dense turns."""
    held_out: dict[str, dict[str, HeldOut]]


@cache
def analyse(level: float) -> Analysis:
    """Fit everything; ``ConfigError`` for a ``level`` that is none, and where scipy is missing."""
    families = published_families()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # the sentences say it
        return Analysis(
            lines={name: fit_line(*points, level=level) for name, points in families.items()},
            comparisons=compare_lines(families, BASE, level=level),
            laws=fit_power_laws(families, level=level),
            over_entropy=slopes_over_entropy(families, BASE, ENTROPIES, level=level),
            turning={
                name: turning_entropy(families, BASE, name) for name in families if name != BASE
            },
            held_out={
                "straight line": {
                    name: hold_out_largest(fit_line, *points) for name, points in families.items()
                },
                "shared E": hold_out_largest_of(families),
            },
        )


def published_text(level: float = 0.95, *, is_markdown: bool = False) -> str:
    """Every table with what it says, as plain text or Markdown."""
    found = analyse(level)
    sections: list[tuple[str, list[Table], list[str]]] = [
        ("Validation loss at training FLOPs", [_points_table()], _points_notes()),
        (
            "Is a structured curve steeper? Straight lines in log–log",
            [lines_table(found.lines, found.comparisons, BASE)],
            [
                sentence
                for name, comparison in found.comparisons.items()
                for sentence in claim_sentences(comparison, found.turning[name])
            ],
        ),
        (
            "The same with a shared entropy E: loss = E + A·C^−γ",
            [entropy_table(found.over_entropy, BASE)],
            entropy_sentences(found.laws[BASE]),
        ),
        (
            "FLOPs for equal loss",
            [multiplier_table(comparison) for comparison in found.comparisons.values()],
            [],
        ),
        ("The largest size, predicted from the smaller ones", [held_out_table(found.held_out)], []),
        ("Self-guided training, low_rank 32 %: perplexity", [guided_table()], _guided_notes()),
        ("Wide and structured networks", [_wide_table()], ["Marks: A."]),
    ]
    legend = "; ".join(f"{mark}: {meaning}" for mark, meaning in CERTAINTY.items())
    parts = [_section(*section, is_markdown) for section in sections]
    return "\n\n".join([*parts, f"Marks: {legend}."])


def published_json(level: float = 0.95) -> dict[str, Any]:
    """The same as JSON types, with the records that it comes from; None for what is not finite."""
    found = _plain(dataclasses.asdict(analyse(level)))
    records = [dataclasses.asdict(record) for record in published_records()]
    return found | {"self_guided": guided_json(), "records": records}


def plot_published(folder: str | os.PathLike[str], level: float = 0.95) -> list[Path]:
    """The scaling and the self-guided figure as PNG and SVG in ``folder``, which is made.

    Raises ``ConfigError`` where matplotlib is missing, ``StorageError`` for what cannot be written.
    """
    folder = Path(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    families = published_families()
    over = slopes_over_entropy(families, BASE, DRAWN_ENTROPIES, level=level)
    paths = []
    for suffix in SUFFIXES:
        paths.append(plot_scaling(families, BASE, folder / f"scaling{suffix}", over=over))
        paths.append(plot_guided(folder / f"self_guided{suffix}"))
    return paths


def _section(title: str, tables: list[Table], notes: list[str], is_markdown: bool) -> str:
    if is_markdown:
        parts = [f"## {title}", *(table.markdown() for table in tables)]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]).rstrip()
    parts = [title, *(table.plain() for table in tables), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _points_table() -> Table:
    records = published_records("scaling")
    sizes = list(dict.fromkeys(record.size or "" for record in records))
    cells = {
        (record.model, record.size): f"{record.values['loss']:.4f} @ "
        f"{record.values['training_flops']:.4g}{' *' if record.note else ''}"
        for record in records
    }
    models = list(dict.fromkeys(record.model for record in records))
    rows = [(model, *(cells[model, size] for size in sizes)) for model in models]
    return Table(header=("family", *sizes), rows=tuple(rows))


def _points_notes() -> list[str]:
    weak = [record for record in published_records("scaling") if record.note]
    notes = [f"* {record.note}" for record in weak]
    return [*notes, "One run a point, no seeds. Marks: B."]


def _guided_notes() -> list[str]:
    return [
        "Closed: the share of the loss gap to dense that guidance closes beyond the control of "
        "more tokens at equal FLOPs, and beyond the unguided model at equal tokens. Below 0 the "
        "control is better. Marks: B; unguided s, m: D, xl: A."
    ]


def _wide_table() -> Table:
    header = ("model", "parameters", "FLOPs", "tokens", "perplexity", "tokens/s", "vs dense")
    rows = []
    dense: dict[str | None, float] = {}
    for record in published_records("wide"):
        values = record.values
        dense.setdefault(record.size, values["tokens_per_second"])
        rows.append(
            (
                f"{record.size} {record.model}",
                format_count(values["num_params"]),
                format_scientific(values["training_flops"]),
                format_count(values["num_tokens"]),
                f"{values['perplexity']:.2f}",
                f"{values['tokens_per_second']:,.0f}",
                f"{values['tokens_per_second'] / dense[record.size]:.2f}x",
            )
        )
    return Table(header=header, rows=tuple(rows))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

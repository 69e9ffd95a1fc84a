"""The papers' scaling claims, tested and redrawn from their own points."""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from pathlib import Path
from typing import Any

from factorlm.report.analysis import Analysis, analyse
from factorlm.report.claims import claim_sentences, entropy_sentences
from factorlm.report.guided import guided_json, guided_table, plot_guided
from factorlm.report.scaling import (
    entropy_table,
    gamma_table,
    held_out_table,
    lines_table,
    multiplier_table,
    slopes_of,
)
from factorlm.report.scaling_picture import plot_scaling
from factorlm.report.sections import Section, plain_json
from factorlm.report.tables import Table, format_count, format_scientific
from factorlm.scaling import published_families, published_records, slopes_over_entropy
from factorlm.scaling.published import CERTAINTY
from factorlm.storage import storage_errors

BASE = "dense"
CHINCHILLA_ENTROPY = 1.69
"""E of Hoffmann et al., arXiv 2203.15556."""
ENTROPIES = (0.0, 0.5, 1.0, 1.5, CHINCHILLA_ENTROPY, 2.0)
DRAWN_ENTROPIES = tuple(0.2 * step for step in range(11))
SUFFIXES = (".png", ".svg")


@cache
def analyse_published(level: float) -> Analysis:
    """Everything that is fitted to the points of the scaling figure; errors are ``analyse``'s."""
    return analyse(published_families(), BASE, ENTROPIES, level)


def published_text(level: float = 0.95, *, is_markdown: bool = False) -> str:
    """Every table with what it says, as plain text or Markdown."""
    found = analyse_published(level)
    sections = [
        Section(
            title="Validation loss at training FLOPs",
            tables=[_points_table()],
            notes=_points_notes(),
        ),
        Section(
            title="Is a structured curve steeper? Straight lines in log–log",
            tables=[lines_table(found.lines, found.comparisons, BASE)],
            notes=[
                sentence
                for name, comparison in found.comparisons.items()
                for sentence in claim_sentences(comparison, found.turning[name])
            ],
        ),
        Section(
            title="The same with a shared entropy E: loss = E + A·C^−γ",
            tables=[
                gamma_table(found.laws_over, found.laws, found.middle_loss),
                entropy_table(found.over_entropy, slopes_of(found.shared), BASE),
            ],
            notes=entropy_sentences(found.laws[BASE]),
        ),
        Section(
            title="FLOPs for equal loss",
            tables=[multiplier_table(comparison) for comparison in found.comparisons.values()],
        ),
        Section(
            title="The largest size, predicted from the smaller ones",
            tables=[held_out_table(found.held_out)],
        ),
        Section(
            title="Self-guided training, low_rank 32 %: perplexity",
            tables=[guided_table()],
            notes=_guided_notes(),
        ),
        Section(title="Wide and structured networks", tables=[_wide_table()], notes=["Marks: A."]),
    ]
    legend = "; ".join(f"{mark}: {meaning}" for mark, meaning in CERTAINTY.items())
    parts = [section.text(is_markdown=is_markdown) for section in sections]
    return "\n\n".join([*parts, f"Marks: {legend}."])


def published_json(level: float = 0.95) -> dict[str, Any]:
    """The same as JSON types, with the records that it comes from; None for what is not finite."""
    found = plain_json(dataclasses.asdict(analyse_published(level)))
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
    lines = analyse_published(level).lines
    over = slopes_over_entropy(families, BASE, DRAWN_ENTROPIES, level=level)
    paths = []
    for suffix in SUFFIXES:
        path = folder / f"scaling{suffix}"
        paths.append(plot_scaling(families, BASE, path, lines=lines, over=over))
        paths.append(plot_guided(folder / f"self_guided{suffix}"))
    return paths


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

"""The numbers of arXiv 2407.09835 and 2406.16450 as records, each with how certain it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factorlm.config import check
from factorlm.errors import did_you_mean
from factorlm.records import PublishedRecord, RecordFile

FILE = Path(__file__).with_name("published.jsonl")
CERTAINTY = {
    "A": "read exactly from a printed table",
    "B": "digitised from a figure (loss ±0.0005, perplexity ±0.03, latency ±0.4 ms)",
    "C": "stated in the text",
    "D": "a third party's transcription that agrees wherever it overlaps",
    "K": "computed by the papers' formula",
}
"""The marks of ``PublishedRecord.certainty``."""
SIZES = ("s", "m", "l", "xl")


def published_records(table: str | None = None) -> list[PublishedRecord]:
    """All records, or those of one ``table``; ``ConfigError`` for one that is not there."""
    records = [record for record in RecordFile(FILE) if isinstance(record, PublishedRecord)]
    if table is None:
        return records
    known = list(dict.fromkeys(record.table for record in records))
    check(
        table in known,
        f"table={table!r} is none of {', '.join(known)}.{did_you_mean(table, known)}",
    )
    return [record for record in records if record.table == table]


def published_families() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scaling figure: family to (training FLOPs, validation loss), each (4,), s to xl."""
    families: dict[str, tuple[list[float], list[float]]] = {}
    for record in published_records("scaling"):
        flops, losses = families.setdefault(record.model, ([], []))
        flops.append(record.values["training_flops"])
        losses.append(record.values["loss"])
    return {name: (np.array(flops), np.array(loss)) for name, (flops, loss) in families.items()}

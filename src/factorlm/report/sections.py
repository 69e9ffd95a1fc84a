"""Tables under headings with what they say, as text, Markdown or JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factorlm.report.tables import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, its tables, and sentences below them."""

    title: str
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def text(self, *, is_markdown: bool) -> str:
        """For a terminal, or as Markdown."""
        if is_markdown:
            parts = [f"## {self.title}", *(table.markdown() for table in self.tables)]
            parts.append("\n".join(f"- {note}" for note in self.notes))
        else:
            parts = [self.title, *(table.plain() for table in self.tables), "\n".join(self.notes)]
        return "\n\n".join(part for part in parts if part)


def plain_json(value: Any) -> Any:
    """The same as JSON types; None for what is not finite."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

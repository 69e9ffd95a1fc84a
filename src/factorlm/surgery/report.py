"""What a swap did, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from factorlm.anatomy import TensorSite


@dataclass(frozen=True)
class SwapRow:
    """One layer that was swapped."""

    name: str
    in_features: int
    out_features: int
    before_kind: str
    after_kind: str
    before_params: int
    """Weights without bias."""
    after_params: int

    @property
    def param_ratio(self) -> float:
        """The share of a dense weight's parameters that was reached."""
        return self.after_params / (self.in_features * self.out_features)


@dataclass(frozen=True)
class SwapReport:
    """The layers that a verb swapped, and what it cannot reach. ``print`` gives a table."""

    rows: tuple[SwapRow, ...]
    untouched: tuple[TensorSite, ...]
    """Expert tensors of mixture-of-experts layers: no linears, so no swap."""

    @property
    def before_params(self) -> int:
        """Weights of all swapped layers before, without biases."""
        return sum(row.before_params for row in self.rows)

    @property
    def after_params(self) -> int:
        """Weights of all swapped layers after, without biases."""
        return sum(row.after_params for row in self.rows)

    @property
    def param_ratio(self) -> float:
        """Weights after, as a share of dense weights of the same sizes."""
        return self.after_params / sum(row.in_features * row.out_features for row in self.rows)

    def __str__(self) -> str:
        lines = [("layer", "kind", "before", "after", "share")]
        for row in self.rows:
            kind = f"{row.before_kind} -> {row.after_kind}"
            lines.append((row.name, kind, *_numbers(row)))
        lines.append((f"total: {len(self.rows)} layers", "", *_numbers(self)))
        return "\n".join([*_align(lines), *self._untouched_lines()])

    def _untouched_lines(self) -> list[str]:
        if not self.untouched:
            return []
        total = sum(site.num_params for site in self.untouched)
        head = f"not touched: {len(self.untouched)} expert tensors, {total:,} parameters"
        return [head, *(f"  {site.name}  {site.num_params:,}" for site in self.untouched)]


def _numbers(row: SwapRow | SwapReport) -> tuple[str, str, str]:
    return f"{row.before_params:,}", f"{row.after_params:,}", f"{row.param_ratio:.1%}"


def _align(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Two columns of text to the left, the numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]

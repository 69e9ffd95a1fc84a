"""Tables as aligned text or Markdown, and the way numbers are written in them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text under a header; the first column is to the left, all others to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)

    def plain(self) -> str:
        """Columns padded with spaces, a rule under the header; empty columns are left out."""
        lines = [self.header, *self.rows]
        used = [column for column in range(len(self.header)) if any(line[column] for line in lines)]
        widths = {column: max(len(line[column]) for line in lines) for column in used}
        text = ["  ".join(_padded(line[c], c, widths[c]) for c in used).rstrip() for line in lines]
        rule = "  ".join("─" * widths[column] for column in used)
        return "\n".join([text[0], rule, *text[1:]])

    def markdown(self) -> str:
        """A GitHub table."""
        rule = (":--", *["--:"] * (len(self.header) - 1))
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _padded(cell: str, column: int, width: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def format_count(value: float) -> str:
    """Four digits and a letter: ``317.4K``, ``1.274B``; whole numbers below 10000 as they are."""
    if abs(value) < 10_000:
        return f"{value:,.4g}" if value != int(value) else f"{int(value):,}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.99995:
            return f"{_digits(value / size)}{letter}"
    raise AssertionError(value)


def format_tick(value: float) -> str:
    """As short as an axis wants it: ``0``, ``2.5``, ``250K``, ``1.5M``, ``20B``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def format_power(value: float) -> str:
    """As short as an axis wants it, with a power of ten: ``0``, ``2.5e18``."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _digits(value: float) -> str:
    """Four significant digits, zeros at the end kept."""
    decimals = max(0, 3 - math.floor(math.log10(abs(value) * 1.00005)))
    return f"{value:.{decimals}f}"


def format_scientific(value: float) -> str:
    """Four digits and a power of ten: ``7.044e19``."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def format_times(value: float) -> str:
    """A ratio: ``1.39``, far from 1 ``3.210e-5`` or ``2.341e24``; ``∞``."""
    if math.isinf(value):
        return "∞"
    is_near = value == 0 or 0.01 <= value < 10_000
    return f"{value:.2f}" if is_near else format_scientific(value)


def format_seconds(seconds: float) -> str:
    """``8.3 s``, ``2:05 min``, ``1:02:03 h``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d} h" if hours else f"{minutes}:{whole:02d} min"

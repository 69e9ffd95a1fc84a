"""Fitted scaling laws as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from factorlm.report.tables import Table, format_scientific, format_times
from factorlm.scaling import Comparison, HeldOut, LineFit, PowerLawFit, SlopeDifference


def between(low: float, high: float, decimals: int = 4) -> str:
    """``-0.0076 to +0.0023``."""
    return f"{low:+.{decimals}f} to {high:+.{decimals}f}"


def chance(p_value: float) -> str:
    """``0.24``, ``0.003``, ``< 0.001``."""
    if math.isnan(p_value):
        return "not known"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.{2 if p_value >= 0.01 else 3}f}"


def percent(level: float) -> str:
    """``95 %``."""
    return f"{100 * level:g} %"


def lines_table(
    lines: Mapping[str, LineFit], comparisons: Mapping[str, Comparison], base: str
) -> Table:
    """A row a family: its slope in log–log, how it differs from ``base``, and why."""
    level = percent(lines[base].level)
    header = ["family", "slope", level]
    if comparisons:
        header += [f"less {base}", level, "p", "by FLOPs", "by loss gap", level]
    rows = [_line_row(name, line, comparisons.get(name)) for name, line in lines.items()]
    return Table(
        header=tuple(header),
        rows=tuple((*row, *[""] * (len(header) - len(row))) for row in rows),
    )


def _line_row(name: str, line: LineFit, comparison: Comparison | None) -> tuple[str, ...]:
    width = line.slope_high - line.slope
    row: tuple[str, ...]
    row = (name, f"{line.slope:.4f}", f"± {width:.4f}" if math.isfinite(width) else "not known")
    if comparison is None:
        return row
    slopes, split = comparison.slopes, comparison.split
    difference = between(slopes.low, slopes.high)
    row = (*row, f"{slopes.difference:+.4f}", difference, chance(slopes.p_value))
    if split is None:
        return row
    gap = between(split.gap_part_low, split.gap_part_high)
    return (*row, f"{split.flops_part:+.4f}", f"{split.gap_part:+.4f}", gap)


def gamma_table(
    over: Sequence[Mapping[str, PowerLawFit]], fitted: Mapping[str, PowerLawFit], loss: float
) -> Table:
    """A row for each shared E, and one for the fitted one: γ of every family with its interval,
    and its local slope d log(loss) / d log(FLOPs) at ``loss``."""
    first = next(iter(fitted.values()))
    header = ["shared E"]
    for name in fitted:
        header += [f"γ {name}", percent(first.level), f"slope at {loss:.2f}"]
    rows = []
    for laws, mark in [*((laws, "") for laws in over), (fitted, ", fitted")]:
        row = [f"{next(iter(laws.values())).E:.2f}{mark}"]
        for law in laws.values():
            interval = f"{law.gamma_low:.4f} to {law.gamma_high:.4f}"
            row += [f"{law.gamma:.4f}", interval, f"{law.local_slope(loss):.4f}"]
        rows.append(tuple(row))
    return Table(header=tuple(header), rows=tuple(rows))


def entropy_table(
    over: Mapping[str, Sequence[SlopeDifference]], fitted: Mapping[str, SlopeDifference], base: str
) -> Table:
    """A row for each shared E, and one for the fitted one: local slopes less that of ``base``."""
    names = list(over)
    level = percent(over[names[0]][0].level)
    header = ["shared E", *(title for name in names for title in (f"{name} less {base}", level))]
    rows = []
    lines = [*zip(*over.values(), strict=True), tuple(fitted[name] for name in names)]
    for slopes in lines:
        row = [f"{slopes[0].E:.2f}" + (", fitted" if slopes is lines[-1] else "")]
        for found in slopes:
            row += [f"{found.difference:+.4f}", between(found.low, found.high)]
        rows.append(tuple(row))
    return Table(header=tuple(header), rows=tuple(rows))


def slopes_of(comparisons: Mapping[str, Comparison]) -> dict[str, SlopeDifference]:
    """The slope difference of each."""
    return {name: comparison.slopes for name, comparison in comparisons.items()}


def multiplier_table(comparison: Comparison) -> Table:
    """A row a loss: the FLOPs of both families and their ratio."""
    level = percent(comparison.slopes.level)
    header = ("loss", comparison.base, comparison.other, "compute multiplier", level)
    rows = [
        (
            f"{found.loss:.3f}",
            format_scientific(found.base_flops),
            format_scientific(found.other_flops),
            format_times(found.multiplier),
            f"{format_times(found.multiplier_low)} to {format_times(found.multiplier_high)}",
        )
        for found in comparison.multipliers
    ]
    return Table(header=header, rows=tuple(rows))


def held_out_table(
    by_law: Mapping[str, Mapping[str, HeldOut]], size: str = "largest, FLOPs"
) -> Table:
    """A row a family: its largest ``size``, and what each law makes of it from the smaller ones."""
    laws = list(by_law)
    header = ["family", size, "loss"]
    for law in laws:
        header += [law, "error"]
    rows = []
    for family, first in by_law[laws[0]].items():
        row = [family, format_scientific(first.size), f"{first.measured:.4f}"]
        for law in laws:
            found = by_law[law][family]
            row += [f"{found.predicted:.4f}", f"{100 * found.error:+.2f} %"]
        rows.append(tuple(row))
    return Table(header=tuple(header), rows=tuple(rows))

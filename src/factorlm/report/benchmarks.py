"""Benchmark records as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from factorlm.records import BarResult, BenchmarkRecord
from factorlm.report.tables import Table

HEADER = ("case", "median ms", "spread", "speed-up", "possible")


def benchmark_title(record: BenchmarkRecord) -> str:
    """``kernel  768x3072  4,096 tokens  fp32  forward+backward``."""
    shown = [_setting(key, value) for key, value in record.settings.items()]
    return "  ".join([record.benchmark, *(text for text in shown if text)])


def benchmark_table(record: BenchmarkRecord) -> Table:
    """A row a case: its time, its speed-up over the baseline and the one that FLOPs allow."""
    rows = []
    for name, case in record.cases.items():
        ideal = case["ideal_speedup"]
        rows.append(
            (
                name,
                f"{case['median_ms']:,.3f}",
                f"{case['spread_ms']:,.3f}",
                "" if name == record.baseline else f"{case['speedup']:.2f}x",
                "" if ideal is None else f"{ideal:.2f}x",
            )
        )
    return Table(header=HEADER, rows=tuple(rows))


def bar_line(bar: BarResult) -> str:
    """``met     low_rank / its bare matmuls: 1.012, at most 1.03``."""
    side = "at most" if bar["at_most"] else "at least"
    verdict = "met   " if is_met(bar) else "MISSED"
    return f"{verdict}  {bar['name']}: {bar['value']:.3f}, {side} {bar['limit']:g}"


def is_met(bar: BarResult) -> bool:
    """Whether the promise was kept."""
    value, limit = bar["value"], bar["limit"]
    return value <= limit if bar["at_most"] else value >= limit


def bars_table(records: Iterable[BenchmarkRecord]) -> Table:
    """Every bar of ``records`` with its setting."""
    rows = [
        (
            f"{benchmark_title(record)}: {bar['name']}",
            f"{bar['value']:.3f}",
            f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}",
            "yes" if is_met(bar) else "no",
        )
        for record in records
        for bar in record.bars
    ]
    return Table(header=("bar", "value", "limit", "met"), rows=tuple(rows))


def _setting(key: str, value: Any) -> str:
    if key == "shape":
        return "x".join(str(size) for size in value)
    if key == "num_tokens":
        return f"{value:,} token{'s' if value != 1 else ''}"
    if value is None or isinstance(value, dict):
        return ""
    return value if isinstance(value, str) else f"{key.removeprefix('num_')} {value}"

"""Tables and pictures of reports/speed, from its records alone (no torch).

    python benchmarks/speed_report.py

Writes reports/speed/results.md and the pictures beside it; README.md there says what they mean.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from factorlm.errors import ConfigError
from factorlm.records import BarResult, BenchmarkRecord, RecordFile
from factorlm.report.benchmarks import bars_table, benchmark_title, is_met
from factorlm.report.speed import plot_speed
from factorlm.report.tables import Table

REPORT = Path("reports/speed")


def load_records() -> dict[str, list[BenchmarkRecord]]:
    """File -> its benchmark records, in order."""
    files = sorted((REPORT / "records").glob("*.jsonl"))
    return {
        path.stem: [record for record in RecordFile(path) if isinstance(record, BenchmarkRecord)]
        for path in files
    }


def hardware(record: BenchmarkRecord) -> str:
    """Processor, threads and versions of a record."""
    values = record.environment
    where = values["gpu"] or f"{values['cpu']}, {values['num_threads']} threads"
    limits = values.get("limits", {})
    where += "".join(f", {name} {value:,.0f}" for name, value in limits.items())
    return f"{where}, torch {values['torch']}, {(values['commit'] or 'no commit')[:7]}"


def section(name: str, records: list[BenchmarkRecord]) -> str:
    """The tables of one file, and its picture where something varies."""
    parts = [f"## {name}"]
    try:
        picture = plot_speed(records, REPORT / f"{name}.png")
        parts.append(f"![{name}: latency and speed-up]({picture.name})")
    except ConfigError:
        pass  # one size only
    machines = list(dict.fromkeys(hardware(record) for record in records))
    return "\n\n".join([*parts, *machines, compact_table(records).markdown()])


def compact_table(records: list[BenchmarkRecord]) -> Table:
    """A row a record, a column a case: median milliseconds and the speed-up over the first; every
    bar's value by its limit."""
    cases = list(dict.fromkeys(name for record in records for name in record.cases))
    rows = []
    for record in records:
        cells = [_cell(record, name) for name in cases]
        bars = ", ".join(_bar(bar) for bar in record.bars)
        rows.append((benchmark_title(record), *cells, bars, str(record.rounds)))
    return Table(header=("setting", *cases, "bars", "rounds"), rows=tuple(rows))


def _bar(bar: BarResult) -> str:
    return f"{bar['value']:.3f} {'≤' if bar['at_most'] else '≥'} {bar['limit']:g}"


def _cell(record: BenchmarkRecord, name: str) -> str:
    case = record.cases.get(name)
    if case is None:
        return ""
    text = f"{case['median_ms']:,.3f} ± {case['spread_ms']:.3f} ms"
    return text if name == record.baseline else f"{text}, {case['speedup']:.2f}x"


def main() -> None:
    found = load_records()
    everything = [record for records in found.values() for record in records]
    missed = [
        dataclasses.replace(record, bars=[bar for bar in record.bars if not is_met(bar)])
        for record in everything
    ]
    parts = [
        "<!-- written by benchmarks/speed_report.py -->",
        "# Speed: every record",
        "Medians and the distance of their quartiles; speed-ups over the first case.",
        f"## Bars that were missed, of {sum(len(record.bars) for record in everything)}",
        bars_table(missed).markdown(),
        *(section(name, records) for name, records in found.items()),
    ]
    (REPORT / "results.md").write_text("\n\n".join(parts) + "\n")
    print(bars_table(everything).plain())


if __name__ == "__main__":
    main()

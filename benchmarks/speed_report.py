"""Tables and pictures of reports/speed, from its records alone (no torch).

    python benchmarks/speed_report.py

Writes reports/speed/results.md and the pictures beside it; README.md there says what they mean.
"""

from __future__ import annotations

from pathlib import Path

from factorlm.errors import ConfigError
from factorlm.records import BenchmarkRecord, RecordFile
from factorlm.report.benchmarks import bars_table, benchmark_table, benchmark_title
from factorlm.report.speed import plot_speed

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
    for record in records:
        title = f"**{benchmark_title(record)}** ({hardware(record)}; {record.rounds} rounds)"
        parts += [title, benchmark_table(record).markdown()]
    return "\n\n".join(parts)


def main() -> None:
    found = load_records()
    everything = [record for records in found.values() for record in records]
    parts = [
        "<!-- written by benchmarks/speed_report.py -->",
        "# Speed: every record",
        "## Bars",
        bars_table(everything).markdown(),
        *(section(name, records) for name, records in found.items()),
    ]
    (REPORT / "results.md").write_text("\n\n".join(parts) + "\n")
    print(bars_table(everything).plain())


if __name__ == "__main__":
    main()

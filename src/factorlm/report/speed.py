"""Pictures of benchmark records: latency against width, latency against tokens."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorlm.config import check
from factorlm.records import BenchmarkRecord
from factorlm.report.facts import hardware_label
from factorlm.report.figures import COLORS, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"num_tokens": "tokens", "width": "width (inputs of the layer)"}
"""Settings that an axis can show, and what the axis says."""
STYLES = {"-": "solid", ":": "dotted", "-.": "dash-dotted"}
"""Of lines that differ in the other setting."""
MARKERS = ("o", "s", "^")
"""Of cases, where these are more than the colours."""


def plot_speed(records: Sequence[BenchmarkRecord], path: str | os.PathLike[str]) -> Path:
    """Latency and speed-up of every case against tokens, or against width where that varies.

    A panel pair for each benchmark, dtype and pass. Bands are the quartiles; dashed lines are the
    speed-ups that FLOPs or bytes allow. Raises ``ConfigError`` where neither varies, for more
    than three values of the other, for another suffix, and where matplotlib is missing.
    """
    groups = speed_groups(records)
    varying = {key: found for key, found in groups.items() if axis_of(found) is not None}
    check(bool(varying), "nothing to draw: neither the tokens nor the width vary")
    for found in varying.values():
        check_lines(found)
    return save_picture(lambda: _draw(varying), path)


def speed_groups(
    records: Sequence[BenchmarkRecord],
) -> dict[tuple[str, ...], list[BenchmarkRecord]]:
    """Records that one panel can show: of one benchmark, dtype and pass, on one hardware."""
    groups: dict[tuple[str, ...], list[BenchmarkRecord]] = {}
    one_machine = len({hardware_label(record.environment) for record in records}) == 1
    for record in records:
        machine = () if one_machine else (hardware_label(record.environment),)
        groups.setdefault((*_group(record), *machine), []).append(record)
    return groups


def check_lines(records: Sequence[BenchmarkRecord]) -> None:
    """Raise ``ConfigError`` unless one panel can show ``records``: a setting of ``AXES`` varies,
    and the other has few enough values for a style of line each."""
    axis = axis_of(records)
    check(axis is not None, "nothing to draw: neither the tokens nor the width vary")
    assert axis is not None
    count = len({other_of(record, axis) for record in records})
    (other,) = (name.removeprefix("num_") for name in AXES if name != axis)
    check(count <= len(STYLES), f"{count} values of {other}: at most {len(STYLES)} can be drawn")


def _group(record: BenchmarkRecord) -> tuple[str, ...]:
    settings = record.settings
    parts = (record.benchmark, settings.get("dtype"), settings.get("pass"))
    return tuple(str(part) for part in parts if part is not None)


def value_of(record: BenchmarkRecord, axis: str) -> float:
    """Of the setting ``axis``, a key of ``AXES``; 0 where the benchmark has no such setting."""
    if axis == "width" and "shape" in record.settings:
        return float(record.settings["shape"][0])
    return float(record.settings.get(axis, 0))


def axis_of(records: Sequence[BenchmarkRecord]) -> str | None:
    """The setting of ``AXES`` with most values, if it has more than one."""
    counts = {axis: len({value_of(record, axis) for record in records}) for axis in AXES}
    best = max(counts, key=lambda axis: counts[axis])
    return best if counts[best] > 1 else None


def _draw(groups: Mapping[tuple[str, ...], Sequence[BenchmarkRecord]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    looks = case_looks(groups.values())
    figure = Figure(figsize=(11, 3.8 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 2, squeeze=False)
    for (latency, speedup), (key, records) in zip(rows, groups.items(), strict=True):
        axis = axis_of(records)
        assert axis is not None
        others = sorted({other_of(record, axis) for record in records})
        for style, other in zip(STYLES, others, strict=False):
            chosen = [record for record in records if other_of(record, axis) == other]
            _draw_cases(latency, speedup, chosen, axis, style, looks)
        latency.set(ylabel="latency (ms)", yscale="log")
        latency.set_title(group_title(key, axis, others), loc="left")
        speedup.set(ylabel="speed-up over dense")
        speedup.axhline(1.0, color="#888888", lw=1)
        for axes in (latency, speedup):
            _finish(axes, axis)
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6)
    return figure


def case_looks(groups: Iterable[Sequence[BenchmarkRecord]]) -> dict[str, dict[str, Any]]:
    """Case -> colour and marker, its own and the same in all panels and lines of a picture."""
    cases = dict.fromkeys(name for records in groups for record in records for name in record.cases)
    pairs = itertools.cycle(itertools.product(MARKERS, COLORS))
    return {
        name: {"color": color, "marker": marker, "ms": 3.5, "lw": 1.6}
        for name, (marker, color) in zip(cases, pairs, strict=False)
    }


def group_title(key: Sequence[str], axis: str, others: Sequence[float]) -> str:
    """``kernel, fp32, forward (solid: width 768, dotted: 2048)``."""
    text = ", ".join(key)
    if len(others) == 1:
        return text
    (other,) = (name.removeprefix("num_") for name in AXES if name != axis)
    pairs = zip(STYLES.values(), others, strict=False)
    lines = ", ".join(f"{name}: {value:g}" for name, value in pairs)
    return f"{text} ({other}, {lines})"


def other_of(record: BenchmarkRecord, axis: str) -> float:
    """What tells lines of one case apart: the setting that is not on the axis."""
    (other,) = (name for name in AXES if name != axis)
    return value_of(record, other)


def _draw_cases(
    latency: Axes,
    speedup: Axes,
    records: Sequence[BenchmarkRecord],
    axis: str,
    style: str,
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    ordered = sorted(records, key=lambda record: value_of(record, axis))
    for name, look in looks.items():
        found = [record for record in ordered if name in record.cases]
        if not found:
            continue
        x = [value_of(record, axis) for record in found]
        cases = [record.cases[name] for record in found]
        latency.plot(x, [case["median_ms"] for case in cases], ls=style, **look)
        low = [case["median_ms"] - case["spread_ms"] / 2 for case in cases]
        high = [case["median_ms"] + case["spread_ms"] / 2 for case in cases]
        latency.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        ideals = [case["ideal_speedup"] for case in cases if case["ideal_speedup"] is not None]
        if len(ideals) == len(cases):
            speedup.plot(x, [case["speedup"] for case in cases], ls=style, **look)
            speedup.plot(x, ideals, color=look["color"], ls="--", lw=0.9)


def _finish(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_xlabel(AXES[axis])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

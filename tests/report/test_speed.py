"""Tables and pictures of benchmark records."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.errors import ConfigError
from factorlm.records import BarResult, BenchmarkRecord, CaseTimes
from factorlm.report.benchmarks import (
    bar_line,
    bars_table,
    benchmark_table,
    benchmark_title,
    is_met,
)
from factorlm.report.figures import COLORS
from factorlm.report.speed import _draw, case_looks, plot_speed


def case(ms: float, speedup: float, ideal: float | None) -> CaseTimes:
    return CaseTimes(
        median_ms=ms, spread_ms=0.1, speedup=speedup, ideal_speedup=ideal, num_tokens=None
    )


def record(width: int = 768, num_tokens: int = 1, **changes: object) -> BenchmarkRecord:
    fields = {
        "benchmark": "kernel",
        "settings": {"shape": [width, 4 * width], "num_tokens": num_tokens, "dtype": "fp32",
                     "pass": "forward", "structures": {"low_rank": {"rank": 3}}},
        "environment": {},
        "baseline": "dense",
        "rounds": 2,
        "cases": {"dense": case(3.0, 1.0, None), "low_rank": case(1.5, 2.0, 3.2)},
        "bars": [BarResult(name="dense / low_rank", value=2.0, limit=3.0, at_most=False)],
    }  # fmt: skip
    return BenchmarkRecord(**(fields | changes))  # type: ignore[arg-type]


def test_a_table_has_speedups_beside_what_is_possible() -> None:
    text = benchmark_table(record()).plain().splitlines()
    assert text[2].split() == ["dense", "3.000", "0.100"]
    assert text[3].split() == ["low_rank", "1.500", "0.100", "2.00x", "3.20x"]
    assert benchmark_title(record()) == "kernel  768x3072  1 token  fp32  forward"


@pytest.mark.parametrize(
    ("value", "at_most", "met"),
    [(1.0, True, True), (1.1, True, False), (1.0, False, True), (0.9, False, False)],
)
def test_a_bar_says_whether_it_is_met(value: float, at_most: bool, met: bool) -> None:
    bar = BarResult(name="x", value=value, limit=1.0, at_most=at_most)
    assert is_met(bar) is met
    assert bar_line(bar).startswith("met" if met else "MISSED")
    assert ("at most 1" if at_most else "at least 1") in bar_line(bar)


def test_the_table_of_bars_names_setting_value_and_limit() -> None:
    rows = bars_table([record(), record(bars=[])]).rows
    assert rows == (
        ("kernel  768x3072  1 token  fp32  forward: dense / low_rank", "2.000", "≥ 3", "no"),
    )


@pytest.mark.parametrize(
    ("records", "label"),
    [
        ([record(num_tokens=n) for n in (4, 1, 2)], "tokens"),
        ([record(width=w) for w in (512, 256)], "width (inputs of the layer)"),
    ],
)
def test_the_axis_is_what_varies(records: list[BenchmarkRecord], label: str) -> None:
    figure = _draw({("kernel",): records})
    latency, speedup = figure.axes
    assert latency.get_xlabel() == label
    dense, low_rank = latency.get_lines()
    assert list(dense.get_xdata()) == sorted(dense.get_xdata())
    assert list(low_rank.get_ydata()) == [1.5] * len(records)
    found = sorted(float(next(iter(line.get_ydata()))) for line in speedup.get_lines())
    assert found == [1.0, 2.0, 3.2]


def test_the_legend_has_every_case_of_every_panel_in_its_one_colour() -> None:
    """The second panel has a case that the first has not, and its dotted lines one more."""
    first = [record(num_tokens=n) for n in (1, 2)]
    low_rank, gelu = case(1.0, 2.0, None), case(0.5, 2.0, None)
    second = [record(num_tokens=n, cases={"GELU": gelu, "low_rank": low_rank}) for n in (1, 2)]
    wide = [record(width=1024, num_tokens=n, cases={"tuned": gelu}) for n in (1, 2)]
    figure = _draw({("kernel",): first, ("ffn",): [*second, *wide]})
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["dense", "low_rank", "GELU", "tuned"]
    colors = dict(zip(names, (line.get_color() for line in legend.get_lines()), strict=True))
    assert len(set(colors.values())) == 4
    latencies = [[line.get_color() for line in panel.get_lines()] for panel in figure.axes[::2]]
    assert latencies == [
        [colors["dense"], colors["low_rank"]],
        [colors["low_rank"], colors["GELU"], colors["tuned"]],
    ]


def test_more_cases_than_colours_look_different() -> None:
    cases = {f"case {index}": case(1.0, 1.0, None) for index in range(len(COLORS) + 3)}
    looks = [tuple(look.items()) for look in case_looks([[record(cases=cases)]]).values()]
    assert len(set(looks)) == len(looks) == len(COLORS) + 3


def test_a_picture_is_written(tmp_path: Path) -> None:
    records = [record(width=w, num_tokens=n) for w in (256, 512) for n in (1, 2, 4)]
    path = plot_speed(records, tmp_path / "speed.svg")
    text = path.read_text()
    assert text.count("<path") > 4 * len(records)  # every case of every record has its points
    assert "<svg" in text


def test_more_lines_of_a_case_than_styles_are_refused(tmp_path: Path) -> None:
    records = [record(width=w, num_tokens=n) for w in (64, 128, 256, 512) for n in (1, 2, 3, 4, 5)]
    with pytest.raises(ConfigError, match="4 values of width: at most 3"):
        plot_speed(records, tmp_path / "speed.png")


def test_nothing_varies_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither the tokens nor the width vary"):
        plot_speed([record()], tmp_path / "speed.png")

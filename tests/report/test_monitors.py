from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.run_records import run_record

from factorlm.errors import ConfigError
from factorlm.records import (
    LOSS_SPIKE,
    EventRecord,
    LayerValues,
    MonitorRecord,
    StepRecord,
)
from factorlm.report import RunSummary, monitors, plot_monitors


def monitored(
    label: str,
    *,
    layers: int = 3,
    factors: tuple[str, ...] = ("V", "U"),
    guide_steps: int = 0,
    num_records: int = 6,
    spikes: tuple[int, ...] = (),
) -> RunSummary:
    """Ten steps a record; factor j of decoder layer i + 1 has the norm step + 100 i + 10 j."""
    num_steps = 10 * num_records
    run = run_record(label, {}, num_steps=num_steps)
    alphas = [1 - s / guide_steps if s < guide_steps else None for s in range(num_steps)]
    steps = tuple(
        StepRecord(
            step=s + 1,
            num_tokens=s + 1,
            loss=1.0,
            learning_rate=1.0,
            grad_norm=1.0,
            step_ms=1.0,
            guide_alpha=alphas[s],
        )
        for s in range(num_steps)
    )
    return RunSummary(
        label=label,
        run=run,
        steps=steps,
        evals=(),
        generation=None,
        is_finished=True,
        monitors=tuple(
            MonitorRecord(
                step=s,
                guide_alpha=alphas[s - 1],
                layers={
                    f"model.layers.{i + 1}.mlp.{kind}": LayerValues(
                        factor_norms={f: s + 100.0 * i + 10 * j for j, f in enumerate(factors)},
                        product_rms=4.0,
                        change_rms=0.5 / s if kind == "c_fc" else 0.0,
                        grad_norm=1.0,
                    )
                    for i in range(layers)
                    for kind in ("c_fc", "c_proj")
                },
            )
            for s in range(10, num_steps + 1, 10)
        ),
        spikes=tuple(EventRecord(event=LOSS_SPIKE, step=s) for s in spikes),
    )


def test_lines_are_the_records() -> None:
    run = monitored("a", guide_steps=20, spikes=(33,))
    first, second, change, alpha = monitors._draw([run]).axes[:4]
    assert first.get_ylabel() == "spectral norm of V"
    assert second.get_ylabel() == "spectral norm of U"
    steps = np.arange(10, 61, 10)
    for place, axes in enumerate((first, second)):
        *lines, spike = axes.get_lines()
        assert list(spike.get_xdata()) == [33, 33]
        assert len(lines) == 6
        for index, line in enumerate(lines):
            np.testing.assert_array_equal(line.get_xdata(), steps)
            expected = steps + 100.0 * (index // 2) + 10 * place
            np.testing.assert_array_equal(line.get_ydata(), expected)
    np.testing.assert_allclose(change.get_lines()[0].get_ydata(), 0.125 / steps)
    assert change.get_yscale() == "log"
    share = alpha.get_lines()[0]
    np.testing.assert_array_equal(share.get_xdata(), np.arange(1, 61))
    np.testing.assert_allclose(share.get_ydata()[:21], 1 - np.arange(21) / 20)
    assert not share.get_ydata()[20:].any()


def test_colour_is_the_decoder_layer_and_dashes_are_the_linear() -> None:
    lines = monitors._draw([monitored("a")]).axes[0].get_lines()
    colors = [line.get_color() for line in lines]
    assert colors[0::2] == colors[1::2]
    assert len(set(colors)) == 3
    dashes = [line.get_linestyle() for line in lines]
    assert dashes == ["-", "--"] * 3
    figure = monitors._draw([monitored("a", layers=1), monitored("b", layers=1)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["c_fc", "c_proj"]


def test_a_row_a_run_with_its_own_factors() -> None:
    runs = [monitored("a", guide_steps=20), monitored("b", factors=("W",))]
    figure = monitors._draw(runs)
    *axes, bar = figure.axes
    grid = np.array(axes).reshape(2, 4)
    assert [row[0].get_title(loc="left") for row in grid] == ["a", "b"]
    shown = [[axes.get_ylabel() for axes in row if axes.get_visible()] for row in grid]
    change = "RMS of change / RMS of product"
    assert shown[0] == ["spectral norm of V", "spectral norm of U", change, "share of the guide, α"]
    assert shown[1] == ["spectral norm of W", change]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["1", "2", "3"]


def test_a_layer_that_came_later_and_a_product_of_zeros_leave_gaps() -> None:
    run = monitored("a", layers=2)
    name = "model.layers.2.mlp.c_fc"
    del run.monitors[0].layers[name]
    run.monitors[1].layers[name]["product_rms"] = 0.0
    line = monitors._draw([run]).axes[2].get_lines()[2]
    assert list(line.get_xdata()) == [20, 30, 40, 50, 60]
    assert np.isnan(line.get_ydata()[0])
    assert np.isfinite(line.get_ydata()[1:]).all()


def test_long_runs_are_thinned() -> None:
    run = monitored("a", layers=1, num_records=1700)
    line = monitors._draw([run]).axes[0].get_lines()[0]
    assert len(line.get_xdata()) <= 800
    assert set(line.get_ydata()) <= {float(record.step) for record in run.monitors}


def test_runs_without_monitors_are_left_out(tmp_path: Path) -> None:
    bare = dataclasses.replace(monitored("bare"), monitors=())
    assert len(monitors._draw([monitored("a", layers=1)]).axes) == 3
    path = plot_monitors([bare, monitored("a")], tmp_path / "m.svg")
    assert path.read_bytes().startswith(b"<?xml")
    assert b"bare" not in path.read_bytes()
    with pytest.raises(ConfigError, match=r"no run has monitor records"):
        plot_monitors([bare], tmp_path / "m.png")
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        plot_monitors([monitored("a")], tmp_path / "m.jpg")

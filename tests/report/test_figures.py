from __future__ import annotations

import builtins
import re
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.run_records import run_record

from factorlm.errors import ConfigError, StorageError
from factorlm.records import EvalRecord, StepRecord
from factorlm.report import RunSummary, figures, plot_losses
from factorlm.report.figures import COLORS


def summary(name: str, *, num_steps: int = 300, num_evals: int = 3, start: float = 9.0):
    run = run_record(
        name,
        {},
        forward_flops_per_token=7.0,
        training_flops=0.0,
        num_steps=num_steps,
        tokens_per_step=10,
    )
    steps = tuple(
        StepRecord(
            step=step,
            num_tokens=10 * step,
            loss=start / step**0.2,
            learning_rate=1.0,
            grad_norm=1.0,
            step_ms=200.0,
        )
        for step in range(1, num_steps + 1)
    )
    evals = tuple(
        EvalRecord(
            step=steps[index].step,
            num_tokens=steps[index].num_tokens,
            source="validation",
            loss=steps[index].loss,
            perplexity=1.0,
            bits_per_byte=None,
            num_eval_tokens=1,
            seconds=1.0,
        )
        for index in np.linspace(0, num_steps - 1, num_evals).astype(int)
    )
    return RunSummary(
        label=name, run=run, steps=steps, evals=evals, generation=None, is_finished=False
    )


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_writes_the_kind_that_the_suffix_says(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = plot_losses([summary("a"), summary("b", num_evals=0)], tmp_path / f"curves{suffix}")
    assert path.read_bytes().startswith(magic)


def test_panels_share_losses_over_tokens_flops_and_time() -> None:
    curve = figures.Curve.of(summary("a"))
    tokens, flops, seconds = figures._draw_losses([curve]).axes
    lines = [axes.get_lines() for axes in (tokens, flops, seconds)]
    x_values = [[line.get_xdata() for line in pair] for pair in lines]
    losses = [line.get_ydata() for line in lines[0]]
    for pair in lines[1:]:
        np.testing.assert_array_equal(pair[0].get_ydata(), losses[0])
    for index in range(2):
        np.testing.assert_allclose(x_values[1][index], 21 * x_values[0][index])
        np.testing.assert_allclose(x_values[2][index], 0.02 * x_values[0][index])
    assert list(losses[1]) == [record.loss for record in curve.run.evals]
    assert "unfinished" in figures._draw_losses([curve]).legends[0].get_texts()[0].get_text()
    low, high = tokens.get_ylim()
    assert low < losses[1].min() < high < losses[0].max()


def test_long_runs_are_thinned_to_their_own_points() -> None:
    curve = figures.Curve.of(summary("a", num_steps=2500))
    line = figures._draw_losses([curve]).axes[0].get_lines()[0]
    assert len(line.get_xdata()) <= figures.MAX_POINTS
    assert set(line.get_ydata()) <= set(curve.loss)


def test_smooth_is_the_mean_of_the_last_values() -> None:
    values = np.array([4.0, 2.0, 6.0, 0.0])
    np.testing.assert_allclose(figures.smooth(values, 2), [4.0, 3.0, 4.0, 3.0])
    np.testing.assert_allclose(figures.smooth(values, 1), values)


def test_refusals_name_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_losses([summary("a")], tmp_path / "curves.jpg")
    with pytest.raises(StorageError, match="missing"):
        plot_losses([summary("a")], tmp_path / "missing" / "curves.png")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'factorlm\[plots\]'"):
        plot_losses([summary("a")], tmp_path / "curves.png")


def test_flops_of_guided_steps_stretch_the_curve() -> None:
    """Where steps say what they spent, that is the axis: here twice as much in the first half."""
    run = summary("guided", num_steps=4)
    spent = (140.0, 280.0, 350.0, 420.0)
    steps = tuple(replace(s, model_flops=f) for s, f in zip(run.steps, spent, strict=True))
    curve = figures.Curve.of(replace(run, steps=steps))
    np.testing.assert_allclose(
        curve.flops_at(np.array([10.0, 20.0, 25.0, 40.0])), [140, 280, 315, 420]
    )


def test_the_page_has_the_colours_of_the_pictures() -> None:
    css = (files("factorlm.report") / "assets" / "page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--series-(\d): (#\w+)", css.split("@media")[0]))
    assert light == {str(index): color.lower() for index, color in enumerate(COLORS)}

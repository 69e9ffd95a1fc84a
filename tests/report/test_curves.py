from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorlm.report import read_run
from factorlm.report.curves import loss_curves, thin


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=300),
    max_points=st.integers(4, 50),
)
def test_thinned_points_are_some_of_the_points_with_the_ends_and_extremes(
    values: list[float], max_points: int
) -> None:
    found = np.array(values)
    kept = thin(found, max_points)
    assert len(kept) <= max(max_points, 4)
    assert list(kept) == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, len(found) - 1)
    finite = found[np.isfinite(found)]
    if len(finite):
        assert finite.min() in found[kept]
    if len(finite) == len(found):
        assert finite.max() in found[kept]
    else:
        assert not np.isfinite(found[kept]).all(), "a value that is not finite was hidden"


def test_a_spike_of_one_step_stays() -> None:
    losses = np.full(5000, 3.0)
    losses[2345] = 9.0
    assert 9.0 in losses[thin(losses, 100)]


def test_curves_say_what_the_records_say(write_run) -> None:
    run = read_run(write_run("a", losses=[4.0, 3.0, 2.0, 1.0], num_evals=2))
    training, validation, kept = loss_curves(run, 100)
    assert list(kept) == [0, 1, 2, 3]
    assert list(training.loss) == [4.0, 3.0, 2.0, 1.0]
    assert list(training.executed_flops) == [step.executed_flops for step in run.steps]
    assert list(training.training_flops) == [step.model_flops for step in run.steps]
    np.testing.assert_allclose(training.seconds, [0.01, 0.02, 0.03, 0.04])
    assert list(validation.step) == [2, 4]
    assert list(validation.num_tokens) == [200, 400]
    assert list(validation.loss) == [record.loss for record in run.evals]
    assert list(validation.executed_flops) == [run.steps[1].executed_flops, run.executed_flops]
    assert training.columns.shape == (7, 4)


def test_smoothing_is_over_all_steps_also_where_few_are_drawn(write_run) -> None:
    losses = [3.0 + (step % 2) for step in range(1000)]
    run = read_run(write_run("a", losses=losses))
    training, _, kept = loss_curves(run, 20)
    assert len(kept) <= 20
    np.testing.assert_allclose(training.smoothed[-1], 3.5)
    assert set(training.loss) == {3.0, 4.0}


def test_records_that_leave_steps_out_keep_the_time(write_run, tmp_path: Path) -> None:
    """Committed copies hold every 30th step: what lies between them took time as well."""
    path = write_run("a", losses=[3.0] * 60) / "records.jsonl"
    lines = path.read_text().splitlines()
    kept = [
        line for line in lines if '"type": "step"' not in line or any(
            f'"step": {step},' in line for step in (30, 60)
        )
    ]  # fmt: skip
    (tmp_path / "copy.jsonl").write_text("\n".join(kept) + "\n")
    thinned = read_run(tmp_path / "copy.jsonl")
    assert len(thinned.steps) == 2
    assert thinned.train_seconds == pytest.approx(read_run(path).train_seconds)


def test_before_flops_were_counted(write_run) -> None:
    path = write_run("a", losses=[4.0, 3.0]) / "records.jsonl"
    text = path.read_text().replace('"executed_flops": 18750.0', '"executed_flops": null')
    path.write_text(text.replace('"model_flops": 15000.0', '"model_flops": null'))
    training, _, _ = loss_curves(read_run(path), 100)
    assert np.isnan(training.executed_flops[0])
    assert list(training.training_flops) == [15000.0, 30000.0]

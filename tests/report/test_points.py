"""Records to points: what is taken, what is left out and why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tests.report.studies import write_grid, write_ladder, write_run

from factorlm.report import gather
from factorlm.report.points import Study, study_of

LABELS = {"ladder": "books", "family": "dense", "size": "w1", "stage": "main"}
RUN: dict[str, Any] = {"num_params": 1e5, "num_tokens": 2e6, "flops": 1e12, "labels": LABELS}


def study(folder: Path, **options: Any) -> Study:
    return study_of(gather([folder]).runs, **options)


def test_a_point_has_the_seeds_of_a_size(tmp_path: Path) -> None:
    for seed, loss in enumerate((4.0, 4.1, 4.3)):
        write_run(tmp_path, f"run-{seed}", **RUN, loss=loss, seed=seed)
    found = study(tmp_path)
    (point,) = found.families["dense"].points
    assert found.count == "executed_flops"
    assert (point.size, point.num_params, point.num_tokens) == ("w1", 100_000, 2_000_000)
    assert point.flops == pytest.approx(1.1e12)
    assert point.losses == (4.0, 4.1, 4.3)
    assert point.runs == ("run-0", "run-1", "run-2")
    assert point.loss == pytest.approx((4.0 * 4.1 * 4.3) ** (1 / 3))
    assert point.spread == pytest.approx(
        math.sqrt((0.1333**2 + 0.0333**2 + 0.1667**2) / 2), abs=1e-4
    )
    assert found.notes == ()


def test_flops_are_counted_as_asked(tmp_path: Path) -> None:
    write_run(tmp_path, "a", **RUN, loss=4.0)
    (point,) = study(tmp_path, count="model_flops").families["dense"].points
    assert point.flops == 1e12
    write_run(tmp_path, "b", **RUN, loss=4.0, seed=1, executed=False)
    assert study(tmp_path).count == "model_flops", "one run did not record what was executed"
    asked = study(tmp_path, count="executed_flops")
    assert asked.families["dense"].points[0].runs == ("a",)
    assert asked.notes == ("Left out, executed_flops not recorded: b.",)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": LABELS | {"stage": "tune"}}, "of stage tune, not main"),
        ({"labels": LABELS | {"stage": "calibration"}}, "of stage calibration, not main"),
        ({"finished": False}, "not finished"),
        ({"guided": True}, "their last evaluation was guided, which no saved model is"),
        ({"last_step": 1}, "their last evaluation was before their last step"),
        ({"loss": math.nan}, "their last loss is not finite and above 0"),
    ],
)
def test_what_is_no_point_is_left_out_and_said(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    write_run(tmp_path, "good", **RUN, loss=4.0)
    write_run(tmp_path, "odd", **(RUN | {"loss": 3.0, "seed": 1} | options))
    found = study(tmp_path)
    assert found.families["dense"].points[0].runs == ("good",)
    assert found.notes == (f"Left out, {reason}: odd.",)


def test_of_runs_with_one_family_size_and_seed_the_best_is_taken(tmp_path: Path) -> None:
    for rate, loss in ((1, 4.2), (2, 4.0), (3, 4.1)):
        write_run(tmp_path, f"rate-{rate}", **RUN, loss=loss, optimizer={"learning_rate": rate})
    found = study(tmp_path)
    assert found.families["dense"].points[0].runs == ("rate-2",)
    (note,) = found.notes
    assert note == (
        "3 runs of dense, size w1, 2.000M tokens and seed 0: only rate-2, of lowest loss, is "
        "fitted; they differ in optimizer.learning_rate."
    )


def test_a_copy_of_a_run_is_no_other_run(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        write_run(tmp_path / folder, "a", **RUN, loss=4.0)
    found = study(tmp_path)
    assert len(found.families["dense"].points[0].losses) == 1
    assert found.notes[0].endswith("they differ in nothing.")


def test_seeds_with_nearly_equal_tokens_are_one_point(tmp_path: Path) -> None:
    """A stochastic guide leaves them so."""
    for seed, share in enumerate((1.0, 1.03, 0.99)):
        spent = {"num_tokens": 2e6 * share, "flops": 1e12 * share, "loss": 4.0}
        write_run(tmp_path, f"run-{seed}", **(RUN | spent), seed=seed)
    write_run(tmp_path, "longer", **(RUN | {"num_tokens": 4e6, "flops": 2e12}), loss=3.9)
    family = study(tmp_path).families["dense"]
    first, second = family.points
    assert first.runs == ("run-0", "run-1", "run-2")
    assert first.num_tokens == pytest.approx(2e6 * 3.02 / 3)
    assert first.flops == pytest.approx(1.1e12 * 3.02 / 3)
    assert second.runs == ("longer",)
    assert family.is_grid


def test_thinned_records_that_lack_the_last_step_count_it(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", **RUN, loss=4.0)
    lines = path.read_text().splitlines(keepends=True)
    (last,) = [line for line in lines if '"type": "step"' in line and '"step": 2' in line]
    path.write_text("".join(line for line in lines if line != last))
    (point,) = study(tmp_path).families["dense"].points
    assert point.flops == pytest.approx(1.1e12)
    assert point.num_tokens == 2_000_000


def test_runs_without_labels_have_their_structure_and_parameters(tmp_path: Path) -> None:
    low_rank = {"structure": "low_rank", "param_ratio": 0.32}
    for params in (1.2e5, 2.4e5):
        options = {"num_params": params, "num_tokens": 20 * params, "flops": params**2, "loss": 4.0}
        write_run(tmp_path, f"dense-{params:g}", **options)
        write_run(tmp_path, f"low-{params:g}", **options, structure=low_rank)
    found = study(tmp_path)
    assert {name: family.sizes for name, family in found.families.items()} == {
        "dense": ("100.0K", "200.0K"),
        "low_rank, 32%": ("100.0K", "200.0K"),
    }


def test_a_ladder_has_points_in_order_and_all_are_its_frontier(tmp_path: Path) -> None:
    family = study(write_ladder(tmp_path)).families["low_rank_32"]
    assert family.sizes == ("w1", "w2", "w3", "w4", "w5")
    assert not family.is_grid
    assert family.frontier == family.points
    compute, loss = family.compute_and_loss
    assert list(loss) == [value for point in family.points for value in point.losses]
    assert len(set(compute)) == 5


def test_the_frontier_of_a_grid_is_the_best_of_each_budget(tmp_path: Path) -> None:
    law = lambda params, tokens, flops: 1.7 + 400 * params**-0.34 + 400 * tokens**-0.28  # noqa: E731
    family = study(write_grid(tmp_path, law)).families["dense"]
    assert family.is_grid
    assert len(family.points) == 20
    best: dict[float, float] = {}
    for point in family.points:
        budget = round(math.log10(point.flops), 3)
        best[budget] = min(best.get(budget, math.inf), point.loss)
    assert [point.loss for point in family.frontier] == list(best.values())


def test_other_data_and_other_text_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, "a", **RUN, loss=4.0, data={"path": "books"})
    write_run(tmp_path, "b", **RUN, loss=4.0, seed=1, data={"path": "code"})
    (note,) = study(tmp_path).notes
    assert note == (
        "data.path differs, so losses cannot be compared between all runs: books, code."
    )

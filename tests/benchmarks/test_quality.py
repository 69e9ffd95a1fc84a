"""The plan of reports/quality: what runs next, given what was found."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from factorlm.records import EvalRecord, RecordFile, RunRecord
from factorlm.train.describe import describe

ROOT = Path(__file__).parents[2]
RECIPES = str(ROOT / "recipes" / "quality")


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quality() -> Any:
    return load_script("quality")


@pytest.fixture(scope="module")
def report() -> Any:
    found = load_script("quality_report")
    found.REPORT = ROOT / "reports" / "quality"
    return found


@pytest.fixture
def steps(quality: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(quality, "REPORT", ROOT / "reports" / "quality")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.chdir(ROOT)
    return load_script("quality_steps")


@pytest.fixture
def values() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "reports" / "quality" / "plan.yaml").read_text())
    return found | {"recipes": RECIPES}


def done(quality: Any, values: Any, loss_of: Callable[[Any], float], rounds: int = 9) -> Any:
    """The plan once everything that it asks for is run, ``loss_of`` giving losses."""
    losses: dict[str, float] = {}
    for _ in range(rounds):
        pending = quality.Plan(values, losses).pending()
        if not pending:
            break
        losses |= {run.name: loss_of(run) for run in pending}
    return quality.Plan(values, losses)


def bowl(best: float) -> Callable[[Any], float]:
    """Losses with one best rate."""
    return lambda run: abs(run.sections["optimizer"]["learning_rate"] / best - 1)


def test_grids_grow_outward_until_the_best_is_inside(quality: Any) -> None:
    losses = {1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: 2.0, 16.0: 2.5, 0.5: 9.0}
    assert quality.extended([1, 2, 4], 2.0, lambda rate: None) == [1, 2, 4]
    assert quality.extended([1, 2, 4], 2.0, losses.get) == [1, 2, 4, 8, 16]
    assert quality.extended([16, 8, 32], 2.0, (losses | {32.0: 3.0}).get) == [4, 8, 16, 32]


def test_every_row_is_swept_until_its_best_rate_is_inside(quality: Any, values: Any) -> None:
    plan = done(quality, values, bowl(0.001))
    assert plan.pending() == []
    for row in values["rows"]:
        rates = sorted(
            run.sections["optimizer"]["learning_rate"]
            for run in plan.runs()
            if run.name.startswith(f"sweep-{row}-")
        )
        assert len(rates) >= 3
        assert rates[0] < 0.001 < rates[-1]


def test_full_runs_take_their_stated_rate_and_what_their_row_says(
    quality: Any, values: Any
) -> None:
    runs = {run.name: run for run in quality.Plan(values, {}).runs()}
    for name, entry in values["full"].items():
        for point in entry["points"]:
            run = runs[f"{name}-{point}-s0"]
            row = values["rows"].get(entry.get("row"), {}) | entry
            assert run.recipe == row["recipe"]
            assert run.sections["optimizer"]["learning_rate"] == float(entry["rate"])
            assert run.sections["optimizer"]["kind"] == row["optimizer"]["kind"]


def test_every_structure_and_optimizer_has_its_points_and_the_best_have_seeds(
    quality: Any, values: Any
) -> None:
    runs = quality.Plan(values, {}).runs()
    found = {
        (run.recipe, run.sections["optimizer"]["kind"], run.name.split("-")[-2])
        for run in runs
        if run.name.endswith("-s0")
    }
    for kind in ("low_rank_32", "block_shuffle_32", "block_dense_32"):
        for optimizer in ("muon", "spectron"):
            assert {(kind, optimizer, point) for point in "TCG"} <= found
    assert {("low_rank_32", "adamw", point) for point in "TCG"} <= found
    names = [run.name for run in runs]
    for row in ("dense_rate8-T", "wide_h128_block_shuffle-C", "low_rank_rate8-G"):
        assert {f"{row}-s{seed}" for seed in (0, 1, 2)} <= set(names)
    assert {"longer_dense-T-s0", "longer_low_rank-C-s0", "longer_low_rank-G-s0"} <= set(names)


def test_records_belong_to_the_plan(quality: Any, values: Any) -> None:
    """No record that the plan does not ask for, and each at the plan's rate and seed."""
    folder = ROOT / "reports" / "quality" / "records"
    records = {path.stem: next(iter(RecordFile(path))) for path in folder.glob("*.jsonl")}
    losses = {path.stem: loss_of(path) for path in folder.glob("*.jsonl")}
    runs = {run.name: run for run in quality.Plan(values, losses).runs()}
    assert set(records) <= set(runs)
    for name, record in records.items():
        assert isinstance(record, RunRecord)
        config = runs[name].config(RECIPES).to_dict()
        for section in ("optimizer", "structure", "model", "batch"):
            assert record.config[section] == config[section], name
        assert record.config["seed"] == config["seed"]


def loss_of(path: Path) -> float:
    return [r for r in RecordFile(path) if isinstance(r, EvalRecord)][-1].loss


def test_c_and_g_spend_what_the_best_dense_row_spends(quality: Any, values: Any) -> None:
    """Executed FLOPs, to within a step and a guided step."""
    runs = {run.name: run for run in quality.Plan(values, {}).runs()}
    budget = describe(runs["dense_rate8-T-s0"].config(RECIPES)).training.executed_flops
    rows = ["low_rank_muon_rate8", "low_rank_spectron_rate16", "low_rank_aware_rate8"]
    for row in [*rows, "block_shuffle_spectron"]:
        for point in "CG":
            plan = describe(runs[f"{row}-{point}-s0"].config(RECIPES)).plan
            slack = plan.step.executed_flops
            slack += plan.guided_step.executed_flops if plan.guided_step else 0
            assert abs(plan.total.executed_flops - budget) <= slack
            assert (plan.guide is not None) == (point == "G")
    plain = describe(runs["low_rank_muon_rate8-T-s0"].config(RECIPES)).plan
    assert plain.num_steps == describe(runs["dense_rate8-T-s0"].config(RECIPES)).plan.num_steps


def test_the_best_rate_moves_by_at_most_one_step_over_widths(report: Any, values: Any) -> None:
    """On the grid of square roots of two, means over seeds; from the records."""
    curves = report.transfer_curves(report.load_results())
    assert sorted(curves) == values["transfer"]["widths"] == [64, 128, 256]
    best = [min(points, key=points.get) for points in curves.values()]
    for points, rate in zip(curves.values(), best, strict=True):
        assert min(points) < rate < max(points)  # not at an edge
    assert max(best) / min(best) < 2**0.5 * 1.01


def test_differences_are_of_pairs_with_one_seed(report: Any) -> None:
    def results(losses: dict[int, float]) -> list[Any]:
        runs = {seed: SimpleNamespace(config={"seed": seed}) for seed in losses}
        return [SimpleNamespace(run=runs[seed], loss=loss) for seed, loss in losses.items()]

    found = {
        "dense_rate8": {"T": results({0: 3.0, 1: 5.0})},
        "wide": {"C": results({0: 2.9, 1: 4.9, 2: 9.0}), "G": results({1: 4.8})},
    }
    table = report.difference_table(found).splitlines()[2:]
    assert table == ["| wide-G | -0.2000 |", "| wide-C | -0.1000 ± 0.0000 (2) |"]
    assert report.guidance_table(found).splitlines()[2:] == ["| wide | -0.1000 |"]


def test_steps_are_timed_of_every_row_with_its_guide_and_without(steps: Any, values: Any) -> None:
    """Also of rows with points G or F alone; those that differ by their rate are timed once."""
    rows = steps.configs()
    assert set(values["full"]) == {name for name in rows if not name.endswith(" guided")}
    for name, config in rows.items():
        assert (config.guide.variant == "full") == name.endswith(" guided"), name
    assert len(rows) > len({steps.alike(config) for config in rows.values()})
    pairs = [("wide_h128_rate8", "wide_h128"), ("block_shuffle_half_guided", "block_shuffle_rate8")]
    for row, other in pairs:
        assert steps.alike(rows[row]) == steps.alike(rows[other])


def test_minutes_are_of_steps_with_a_guide_and_without(report: Any) -> None:
    result = report.load_results()["wide_h128_rate8-G-s0"]
    run = result.run
    took = (run.num_steps - run.num_guide_steps) * 300 + run.num_guide_steps * 500
    times = {"wide_h128_rate8": 300.0, "wide_h128_rate8 guided": 500.0}
    assert report.minutes(result, "wide_h128_rate8", times) == f"{took / 60000:.1f}"


def test_every_row_was_timed(report: Any, steps: Any) -> None:
    assert set(report.step_times()) == set(steps.configs())


def test_longer_runs_have_a_table_of_their_own(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records").symlink_to(report.REPORT / "records")
    monkeypatch.setattr(report, "REPORT", tmp_path)
    report.main()
    sections = (tmp_path / "results.md").read_text().split("\n## ")
    full, longer = (
        next(part for part in sections if part.startswith(title))
        for title in ("At the full number of tokens", "With three times the tokens")
    )
    assert "| longer_" not in full
    assert longer.count("\n| longer_") == len(longer.splitlines()[4:])

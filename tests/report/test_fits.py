"""Fits of invented runs find the laws that these follow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tests.report.studies import ENTROPY, GAMMAS, write_grid, write_ladder, write_run

from factorlm.errors import ConfigError, DataError
from factorlm.report import fits_json, fits_text, gather
from factorlm.report.analysis import entropy_range
from factorlm.report.fits import StudyFits, base_of, fit_study
from factorlm.report.points import study_of
from factorlm.scaling import (
    bootstrap,
    compare_lines,
    fit_line,
    fit_power_law,
    fit_power_laws,
    hold_out_largest,
)
from factorlm.scaling.fit.data import size_means


def fits_of(folder: Path, **options: object) -> StudyFits:
    return fit_study(study_of(gather([folder]).runs), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> StudyFits:
    return fits_of(write_ladder(tmp_path_factory.mktemp("ladder")))


def test_a_ladder_gives_its_entropy_and_exponents_back(ladder: StudyFits) -> None:
    for name, law in ladder.analysis.laws.items():
        assert law.E_low < ENTROPY < law.E_high
        assert law.E_high - law.E_low < 0.5
        assert law.gamma_low < GAMMAS[name] < law.gamma_high
    assert ladder.analysis.has_entropy
    shared = ladder.analysis.shared["low_rank_32"].slopes
    assert shared.is_steeper
    true = (GAMMAS["dense"] - GAMMAS["low_rank_32"]) * (1 - ENTROPY / shared.loss)
    assert shared.low < true < shared.high


def test_it_is_what_the_functions_for_points_give(ladder: StudyFits) -> None:
    families, found = ladder.families, ladder.analysis
    means = {name: size_means(*points) for name, points in families.items()}
    assert found.of_sizes == ("straight lines",)  # the points are of curved laws
    assert any("Straight lines are fitted to the mean of each size" in n for n in ladder.notes)
    for name, points in means.items():
        line, expected = found.lines[name], fit_line(*points)
        assert (line.slope, line.slope_high) == (expected.slope, expected.slope_high)
    assert found.comparisons == compare_lines(means, "dense")
    assert found.laws == fit_power_laws(families)
    held = found.held_out["straight line"]["dense"]
    assert held == hold_out_largest(fit_line, *families["dense"])
    assert abs(found.held_out["shared E"]["dense"].error) < 0.01
    entropies = entropy_range(families)
    assert [next(iter(laws.values())).E for laws in found.laws_over] == list(entropies)
    assert [slopes.E for slopes in found.over_entropy["low_rank_32"]] == list(entropies)


def test_what_a_ladder_does_not_say_is_said(ladder: StudyFits) -> None:
    reason = "each size is trained for one number of tokens, which goes with it"
    assert f"dense: no law of parameters and tokens: {reason}." in ladder.notes
    assert ladder.chinchilla == ladder.bootstrap == {}


def test_the_range_of_entropies_ends_below_the_losses() -> None:
    for lowest in (0.31, 1.0, 3.3, 7.9):
        entropies = entropy_range({"a": (np.array([1e9]), np.array([lowest]))})
        assert entropies[0] == 0
        assert 4 <= len(entropies) <= 8
        assert 0.6 * lowest < entropies[-1] <= 0.9 * lowest


def test_a_grid_gives_chinchillas_coefficients_and_the_best_size(tmp_path: Path) -> None:
    def law(params: float, tokens: float, flops: float) -> float:
        return 1.69 + 406.4 * params**-0.34 + 410.7 * tokens**-0.28

    found = fits_of(write_grid(tmp_path, law, noise=0.001), budget=1e17)
    fit = found.chinchilla["dense"]
    assert fit.alpha_low < 0.34 < fit.alpha_high
    assert fit.beta_low < 0.28 < fit.beta_high
    assert fit.E_low < 1.69 < fit.E_high
    budget = found.budgets["dense"]
    assert budget.flops_per_param_and_token == pytest.approx(6.6), "executed, 1.1 times 6"
    params = np.geomspace(1e6, 1e9, 20_001)
    best = params[np.argmin([law(n, 1e17 / 6.6 / n, 0) for n in params])]
    assert budget.best.num_params == pytest.approx(best, rel=0.05)
    assert 6.6 * budget.best.num_params * budget.best.num_tokens == pytest.approx(1e17)
    assert not budget.is_extrapolated
    assert any("4 of 20 points that no cheaper one beats" in note for note in found.notes)


def test_the_largest_model_of_a_grid_is_held_out(tmp_path: Path) -> None:
    """The law gives it back where it holds, and is off where that model is another one's."""

    def law(params: float, tokens: float, flops: float) -> float:
        return 1.69 + 406.4 * params**-0.34 + 410.7 * tokens**-0.28

    def bent(params: float, tokens: float, flops: float) -> float:
        return law(params, tokens, flops) * (1.1 if params > 1e9 else 1.0)

    for name, one, error in (("held", law, 0.0), ("bent", bent, 1 / 1.1 - 1)):
        found = fits_of(write_grid(tmp_path / name, one, noise=1e-4))
        held = found.chinchilla_held_out["dense"]
        assert held.size == max(point.num_params for point in found.study.families["dense"].points)
        assert held.size > 1e9
        assert held.error == pytest.approx(error, abs=2e-3)
        text = fits_text(found)
        assert "most parameters" in text
        assert f"{held.predicted:.4f}  {100 * held.error:+.2f} %" in text
        assert fits_json(found)["chinchilla_held_out"]["dense"]["error"] == held.error
    few = fits_of(write_ladder(tmp_path / "few"))
    assert few.chinchilla_held_out == {}
    assert "most parameters" not in fits_text(few)


def test_a_budget_far_from_the_points_is_an_extrapolation(tmp_path: Path) -> None:
    law = lambda params, tokens, flops: 1.7 + 400 * params**-0.34 + 400 * tokens**-0.28  # noqa: E731
    write_grid(tmp_path, law)
    assert fits_of(tmp_path, budget=1e24).budgets["dense"].is_extrapolated
    assert fits_of(tmp_path).budgets["dense"].flops == pytest.approx(1.1e18)
    for budget in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"budget=.* must be finite and above 0"):
            fits_of(tmp_path, budget=budget)


def test_the_bootstrap_comes_with_eight_sizes_and_three_seeds(tmp_path: Path) -> None:
    params = np.geomspace(3e4, 3e6, 8)
    write_ladder(tmp_path, families=["dense"], params=params, seeds=3)
    write_ladder(tmp_path, families=["low_rank_32"], params=params, seeds=2)
    found = fits_of(tmp_path)
    assert list(found.bootstrap) == ["dense"]
    assert found.bootstrap["dense"]["line"] == bootstrap(fit_line, *found.families["dense"])
    low, high = found.bootstrap["dense"]["power law"]["gamma"]
    assert low < fit_power_law(*found.families["dense"]).gamma < high


def test_one_size_is_no_law_and_two_are_a_line(tmp_path: Path) -> None:
    write_ladder(tmp_path, families=["dense"], params=[3e4], seeds=2)
    with pytest.raises(DataError, match="no family has two sizes to fit\ndense has one size, w1"):
        fits_of(tmp_path)
    write_ladder(tmp_path, families=["low_rank_32"], params=[3e4, 1e5], seeds=1)
    found = fits_of(tmp_path)
    assert list(found.analysis.lines) == ["low_rank_32"]
    assert found.analysis.base == "low_rank_32"
    assert found.analysis.laws == found.analysis.held_out == found.analysis.comparisons == {}
    notes = "\n".join(found.notes)
    assert "dense has one size, w1; a law needs two." in notes
    assert "low_rank_32: two points have no spread about their line" in notes
    assert "No family has three sizes" in notes


def test_a_size_that_beats_all_others_is_no_law(tmp_path: Path) -> None:
    for size, tokens, loss in (("a", 1e6, 5.0), ("a", 4e6, 4.0), ("b", 2e6, 6.0)):
        labels = {"ladder": "x", "family": "dense", "size": size, "stage": "main"}
        options = {"num_params": 1e4, "num_tokens": tokens, "flops": 1e5 * tokens, "loss": loss}
        write_run(tmp_path, f"{size}-{tokens:g}", **options, labels=labels)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="dense: its size a beats all others; a law needs two"):
        fits_of(tmp_path)


def test_a_split_wants_the_same_sizes(tmp_path: Path) -> None:
    write_ladder(tmp_path, families=["dense"])
    write_ladder(tmp_path, families=["low_rank_32"], params=[3e4, 1e5, 3e5, 1e6])
    labels = {"ladder": "books", "family": "low_rank_32", "size": "w9", "stage": "main"}
    options = {"num_params": 1e7, "num_tokens": 2e8, "flops": 1e16}
    write_run(tmp_path, "other", **options, loss=3.0, labels=labels)  # type: ignore[arg-type]
    found = fits_of(tmp_path)
    assert found.analysis.comparisons["low_rank_32"].split is None
    assert any("low_rank_32 less dense: not split into parts" in note for note in found.notes)


def test_the_base_is_dense_unless_another_is_named() -> None:
    families = dict.fromkeys(["low_rank", "dense, muon"])
    assert base_of(families, None) == "dense, muon"
    assert base_of(families | {"dense": None}, None) == "dense"
    assert base_of({"low_rank": None}, None) == "low_rank"
    assert base_of(families, "low_rank") == "low_rank"
    with pytest.raises(ConfigError, match=r"base='low_rnk' is none of .* Did you mean"):
        base_of(families, "low_rnk")


def test_no_flops_for_equal_loss_where_a_loss_rises(tmp_path: Path) -> None:
    losses = {"dense": (5.0, 4.5, 4.2, 4.0), "worse": (3.9, 4.1, 4.4, 4.8)}
    for family, by_size in losses.items():
        for size, loss in enumerate(by_size):
            labels = {"ladder": "x", "family": family, "size": f"w{size}", "stage": "main"}
            options = {"num_params": 1e4 * 3**size, "num_tokens": 1e6, "flops": 1e12 * 9**size}
            write_run(tmp_path, f"{family}-{size}", **options, loss=loss, labels=labels)  # type: ignore[arg-type]
    assert "The loss of worse does not fall with FLOPs" in fits_text(fits_of(tmp_path))

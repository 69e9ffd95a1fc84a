"""``GuideSchedule``: α by its formulas, and steps that are drawn as often as α says."""

from __future__ import annotations

import itertools
import math

import pytest

from factorlm.errors import ConfigError
from factorlm.optim import GuideSchedule

KINDS = ("cosine", "linear")


def alphas(**fields) -> list[float]:  # type: ignore[no-untyped-def]
    schedule = GuideSchedule(**fields)
    return [schedule.alpha_at(step) for step in range(schedule.num_steps)]


def stochastic(num_steps: int, **fields) -> GuideSchedule:  # type: ignore[no-untyped-def]
    return GuideSchedule(num_steps=num_steps, variant="stochastic", **fields)


def drawn(num_steps: int, **fields) -> list[bool]:  # type: ignore[no-untyped-def]
    schedule = stochastic(num_steps, **fields)
    return [schedule.is_guided(step) for step in range(num_steps)]


# α -------------------------------------------------------------------------------------------


def test_cosine_by_hand() -> None:
    half_root = math.sqrt(0.5)
    wanted = [1.0, (1 + half_root) / 2, 0.5, (1 - half_root) / 2]
    assert alphas(num_steps=4) == pytest.approx(wanted)
    assert alphas(num_steps=3, kind="cosine") == pytest.approx([1.0, 0.75, 0.25])


def test_linear_by_hand() -> None:
    assert alphas(num_steps=4, kind="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_alpha_falls_from_one_and_is_gone_after_its_steps(kind: str, num_steps: int) -> None:
    found = alphas(num_steps=num_steps, kind=kind)
    assert found[0] == 1.0
    assert all(a > b > 0 for a, b in itertools.pairwise(found))
    schedule = GuideSchedule(num_steps=num_steps, kind=kind)  # type: ignore[arg-type]
    assert [schedule.alpha_at(num_steps + k) for k in (0, 1, 10**6)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("variant", ["full", "stochastic"])
def test_alpha_does_not_depend_on_variant_nor_seed(variant: str) -> None:
    assert alphas(num_steps=9, variant=variant, seed=4) == alphas(num_steps=9)


# Draws ---------------------------------------------------------------------------------------


def test_full_guides_every_step_of_its_own_and_none_after() -> None:
    """It is what a schedule does that says nothing else."""
    schedule = GuideSchedule(num_steps=5)
    assert schedule.variant == "full"
    assert [schedule.is_guided(step) for step in range(8)] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_guides_the_first_step_and_none_after_its_own(kind: str) -> None:
    for seed in range(50):
        schedule = stochastic(5, kind=kind, seed=seed)
        assert schedule.is_guided(0), "α is 1"
        assert not any(schedule.is_guided(step) for step in range(5, 50))


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    """In any order, from any object; a longer schedule, with a larger α, keeps the guided steps."""
    wanted = drawn(200, seed=3)
    schedule = stochastic(200, seed=3)
    backwards = [schedule.is_guided(step) for step in reversed(range(200))]
    assert backwards[::-1] == wanted
    longer = drawn(400, seed=3)[:200]
    assert all(late or not early for early, late in zip(wanted, longer, strict=True))
    assert longer != wanted


def test_every_machine_and_version_draws_the_same() -> None:
    """Resuming a run needs it: these draws may not change."""
    assert "".join(str(int(guided)) for guided in drawn(24, seed=11)) == "111111111111010001001000"


def test_seeds_draw_differently() -> None:
    """Two of 20 seeds would agree over 200 steps, of which some 100 are open, once in 10^20."""
    assert len({tuple(drawn(200, seed=seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [16, 1000])
def test_steps_are_guided_as_often_as_alpha_says(kind: str, num_steps: int) -> None:
    """Each quarter of the schedule, over 300 seeds, to four standard deviations of a binomial."""
    chances = alphas(num_steps=num_steps, kind=kind)
    counts = [0] * num_steps
    for seed in range(300):
        for step, guided in enumerate(drawn(num_steps, kind=kind, seed=seed)):
            counts[step] += guided
    quarter = num_steps // 4
    for start in range(0, num_steps, quarter):
        part = chances[start : start + quarter]
        deviation = math.sqrt(300 * sum(chance * (1 - chance) for chance in part))
        found = sum(counts[start : start + quarter])
        assert found == pytest.approx(300 * sum(part), abs=4 * deviation)


def test_neighbouring_steps_are_drawn_independently() -> None:
    """Of the steps around the middle, where α is near 1/2, pairs are guided α² of the time."""
    chances = alphas(num_steps=1000)
    both = sum(
        found[step] and found[step + 1]
        for found in (drawn(1000, seed=seed) for seed in range(100))
        for step in range(450, 550)
    )
    pairs = [chances[step] * chances[step + 1] for step in range(450, 550)]
    # Overlapping pairs: the variance of one is at most 1/4, and that of a sum at most 3 times so.
    deviation = math.sqrt(100 * 3 * 0.25 * len(pairs))
    assert both == pytest.approx(100 * sum(pairs), abs=4 * deviation)


# Counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 1000])
def test_expected_guided_steps_are_half_of_them_and_a_half(kind: str, num_steps: int) -> None:
    """Σ α(t) over t < T is (T + 1) / 2 for either schedule: α(t) + α(T - t) = 1."""
    schedule = stochastic(num_steps, kind=kind)
    assert schedule.expected_guided_steps == pytest.approx((num_steps + 1) / 2)


def test_full_expects_all_steps() -> None:
    assert GuideSchedule(num_steps=7, variant="full").expected_guided_steps == 7.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"num_steps": 3, "kind": "cosin"}, "kind='cosin' must be"),
        ({"num_steps": 3, "variant": "none"}, "variant='none' must be"),
    ],
)
def test_a_bad_schedule_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GuideSchedule(**fields)  # type: ignore[arg-type]

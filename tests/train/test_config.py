"""What a recipe means that leaves things out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from factorlm.errors import ConfigError
from factorlm.train import TrainConfig
from factorlm.train.describe import describe

MakeValues = Callable[..., dict[str, Any]]


def config(tiny_values: MakeValues, **sections: Any) -> TrainConfig:
    """The tiny run with the defaults of guide and optimizer."""
    values = tiny_values(**sections)
    for name in ("guide", "optimizer"):
        values[name] = sections.get(name, {})
    return TrainConfig.from_dict(values)


def test_a_structured_model_is_guided_within_the_flops_of_its_dense_counterpart(
    tiny_values: MakeValues,
) -> None:
    found = config(tiny_values, batch={"num_steps": 200})
    assert (found.guide.variant, found.guide.share) == ("full", None)
    assert (found.budget.flops, found.budget.count) == ("dense", "executed_flops")
    assert (found.optimizer.kind, found.optimizer.learning_rate) == ("muon", 0.008)
    dense = describe(config(tiny_values, batch={"num_steps": 200}, structure={})).plan
    plan = describe(found).plan
    assert plan.guide is not None
    assert plan.num_steps > 200
    assert plan.guided_step is not None
    slack = plan.step.executed_flops + plan.guided_step.executed_flops
    assert abs(plan.total.executed_flops - dense.total.executed_flops) <= slack


def test_a_dense_model_and_one_with_weights_are_not_guided(tiny_values: MakeValues) -> None:
    for structure in ({}, {"structure": "dense"}):
        found = config(tiny_values, structure=structure)
        assert (found.guide.variant, found.budget.flops) == ("none", None)
        assert describe(found).plan.guide is None
    started = config(tiny_values, model={"preset": None, "init_from": "a/folder"})
    assert started.guide.variant == "none"
    assert started.budget.flops is None


@pytest.mark.parametrize(
    ("sections", "share", "flops"),
    [
        ({"guide": {"share": 0.5}}, 0.5, None),
        ({"budget": {"flops": 1e12}}, None, 1e12),
        ({"guide": {"share": 0.5, "variant": "stochastic"}}, 0.5, None),
    ],
)
def test_what_is_stated_is_kept(
    tiny_values: MakeValues, sections: dict[str, Any], share: float | None, flops: float | None
) -> None:
    found = config(tiny_values, **sections)
    assert found.guide.variant == sections.get("guide", {}).get("variant", "full")
    assert (found.guide.share, found.budget.flops) == (share, flops)


def test_what_auto_means_is_written_down(tiny_values: MakeValues) -> None:
    """So that a run goes on as it began, whatever ``auto`` means by then."""
    found = config(tiny_values)
    assert found.to_dict()["guide"]["variant"] == "full"
    assert TrainConfig.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimzer": {}}, "unknown key 'optimzer'. Did you mean 'optimizer'"),
        ({"batch": {"num_stepps": {}}}, "unknown key 'batch.num_stepps'.*'batch.num_steps'"),
        ({"optimizer": None}, "optimizer=None must have a value"),
        (
            {"checkpoint": {"every_minutes": None}},
            "checkpoint.every_minutes=None must have a value",
        ),
    ],
)
def test_empty_sections_and_nulls_are_refused_where_they_mean_nothing(
    tiny_values: MakeValues, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(tiny_values() | sections)

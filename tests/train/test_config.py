"""What a recipe means that leaves things out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from factorlm.errors import ConfigError
from factorlm.train import TrainConfig
from factorlm.train.describe import describe
from factorlm.train.trainer import Trainer

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
    found = describe(config(tiny_values, batch={"num_steps": 200})).config
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
        ({"budget": {"flops": 3.9e9}}, None, 3.9e9),
        ({"guide": {"share": 0.5, "variant": "stochastic"}}, 0.5, None),
    ],
)
def test_what_is_stated_is_kept(
    tiny_values: MakeValues, sections: dict[str, Any], share: float | None, flops: float | None
) -> None:
    found = describe(config(tiny_values, **sections, batch={"num_steps": 200})).config
    assert found.guide.variant == sections.get("guide", {}).get("variant", "full")
    assert (found.guide.share, found.budget.flops) == (share, flops)


def test_what_auto_means_is_written_down(tiny_values: MakeValues, tmp_path: Path) -> None:
    """So that a run goes on as it began, whatever ``auto`` means by then."""
    values = config(tiny_values, batch={"num_steps": 40})
    trainer = Trainer(values, runs_dir=tmp_path)
    trainer.fit()
    written = TrainConfig.from_dict(yaml.safe_load((tmp_path / "tiny/config.yaml").read_text()))
    assert (written.guide.variant, written.budget.flops) == ("full", "dense")
    assert written == describe(written).config == describe(values).config
    assert Trainer(values, runs_dir=tmp_path).fit().already_finished


FEW_STEPS = {"batch": {"num_steps": 1}}
DEARER = {"structure": {"structure": "low_rank", "rank": 32}, "batch": {"num_steps": 200}}


@pytest.mark.parametrize("sections", [FEW_STEPS, DEARER], ids=["few steps", "dearer than dense"])
def test_auto_is_no_guide_where_nothing_is_left_for_one(
    tiny_values: MakeValues, sections: dict[str, Any]
) -> None:
    found = describe(config(tiny_values, **sections))
    assert found.guide_left_out
    assert (found.config.guide.variant, found.config.budget.flops) == ("none", None)
    assert found.plan.guide is None
    assert found.plan.num_steps == sections["batch"]["num_steps"]
    stated = {"guide": {"variant": "full"}, "budget": {"flops": "dense", "count": "executed_flops"}}
    with pytest.raises(ConfigError, match="leaves nothing for a guide"):
        describe(config(tiny_values, **sections, **stated))


def test_a_guide_that_is_left_out_is_told(tiny_values: MakeValues, tmp_path: Path) -> None:
    values = config(tiny_values, **FEW_STEPS)
    with pytest.warns(UserWarning, match="trained without a guide: guide.variant='auto'"):
        Trainer(values, runs_dir=tmp_path).fit()
    assert "variant: none" in (tmp_path / "tiny/config.yaml").read_text()
    assert Trainer(values, runs_dir=tmp_path).fit().already_finished


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


@pytest.mark.parametrize(
    ("section", "field", "value", "rule"),
    [
        ("eval", "every_steps", 0, "must be at least 1"),
        ("eval", "num_tokens", 0, "must be at least 1"),
        ("eval", "final_num_tokens", -5, "must be at least 1"),
        ("eval", "num_sequences", 0, "must be at least 1"),
        ("checkpoint", "every_steps", 0, "must be at least 1"),
        ("checkpoint", "every_minutes", -1.0, "must be at least 0"),
        ("parallel", "num_threads", 0, "must be at least 1"),
        ("parallel", "timeout_seconds", 0.0, "must be above 0"),
    ],
)
def test_counts_that_cannot_be_are_refused_before_anything_starts(
    tiny_values: MakeValues, section: str, field: str, value: float, rule: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{section}.{field}={value} {rule}"):
        config(tiny_values, **{section: {field: value}})

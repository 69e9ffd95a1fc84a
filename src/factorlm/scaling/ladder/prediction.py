"""A plan with its costs and hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from factorlm.scaling.ladder.calibration import Speed
from factorlm.scaling.ladder.plan import LadderRun, Plan
from factorlm.train.config import TrainConfig
from factorlm.train.describe import Description


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One line of a plan."""

    name: str
    family: str
    size: str
    stage: str
    seed: int
    learning_rate: float | None
    """None while it is being tuned."""
    num_params: int
    num_non_embedding_params: int
    num_tokens: int
    num_steps: int
    training_flops: float
    """By the papers' convention."""
    executed_training_flops: float
    hours: float | None
    """Predicted, with evaluations and start; None without a calibration."""
    loss: float | None
    """Of the last evaluation, once it is done."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A whole plan."""

    runs: tuple[PlannedRun, ...]
    workers: int
    """Runs at a time."""

    @property
    def hours_left(self) -> float | None:
        """Of all runs that are not done, ``workers`` at a time: at least the longest of them."""
        left = [run.hours for run in self.runs if run.loss is None]
        if None in left:
            return None
        hours = [value for value in left if value is not None]
        return max(sum(hours) / self.workers, max(hours, default=0.0))

    def to_dict(self) -> dict[str, object]:
        """Plain JSON, units in its keys."""
        runs = [asdict(run) for run in self.runs]
        return {"runs": runs, "workers": self.workers, "hours_left": self.hours_left}


def predict(
    plan: Plan,
    runs: Sequence[LadderRun],
    losses: Mapping[str, float],
    speeds: Mapping[tuple[str, str], Speed],
    workers: int,
) -> Prediction:
    """What ``runs`` cost, and will take at measured ``speeds`` by (family, size)."""
    return Prediction(
        runs=tuple(
            _planned(plan, run, losses.get(run.name), speeds.get((run.family, run.size)))
            for run in runs
        ),
        workers=workers,
    )


def num_eval_tokens(config: TrainConfig, num_steps: int, split: int) -> int:
    """Tokens that a run of ``num_steps`` evaluates in all, of a validation split of ``split``."""
    section = config.eval
    each, last = (
        split if count is None else min(count, split)
        for count in (section.num_tokens, section.final_num_tokens)
    )
    before_end = (num_steps - 1) // section.every_steps if section.every_steps else 0
    is_longer = section.final_num_tokens != section.num_tokens
    return (before_end + 1) * each + (last if is_longer else 0)


def _hours(run: LadderRun, described: Description, speed: Speed) -> float:
    tokens = num_eval_tokens(run.config, described.plan.num_steps, speed.num_validation_tokens)
    return speed.hours(described.training.executed_flops, tokens)


def _planned(plan: Plan, run: LadderRun, loss: float | None, speed: Speed | None) -> PlannedRun:
    described = plan.describe(run)
    return PlannedRun(
        name=run.name,
        family=run.family,
        size=run.size,
        stage=run.stage,
        seed=run.config.seed,
        learning_rate=None if run.waits_for else run.rate,
        num_params=described.params.total,
        num_non_embedding_params=described.params.non_embedding,
        num_tokens=described.num_tokens,
        num_steps=described.plan.num_steps,
        training_flops=described.training.model_flops,
        executed_training_flops=described.training.executed_flops,
        hours=None if speed is None else _hours(run, described, speed),
        loss=loss,
    )

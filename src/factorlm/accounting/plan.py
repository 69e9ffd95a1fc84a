"""How many steps a run has, and which of them are guided, for a budget of FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from factorlm.accounting.training import TrainingFlops
from factorlm.config import check
from factorlm.optim import GuideSchedule

FlopsKind = Literal["model_flops", "executed_flops"]


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run.

    Steps 0 .. ``num_original_steps`` - 1 read the data in its order. Of a guided run on a budget,
    the steps after them read the data of the guided steps once more (arXiv 2407.09835, section 4);
    a run without a guide goes on to new data.
    """

    num_steps: int
    num_original_steps: int
    guide: GuideSchedule | None
    step: TrainingFlops
    """Of one step of the structured model alone."""
    guided_step: TrainingFlops | None
    """What a guided step adds."""

    @property
    def num_replayed_steps(self) -> int:
        """Steps at the end that read the data of the guided steps once more."""
        return 0 if self.guide is None else self.num_steps - self.num_original_steps

    def data_step(self, step: int) -> int:
        """The step in the data's order whose batch step ``step`` reads."""
        replays = self.guide is not None and step >= self.num_original_steps
        return step - self.num_original_steps if replays else step

    @property
    def total(self) -> TrainingFlops:
        """Of the whole run; its guided steps as expected over seeds."""
        structured = self.step.times(self.num_steps)
        if self.guide is None or self.guided_step is None:
            return structured
        return structured + self.guided_step.times(self.guide.expected_guided_steps)

    def spent(self, num_steps: int) -> TrainingFlops:
        """By the first ``num_steps`` steps, this seed's guided steps as they are drawn."""
        structured = self.step.times(num_steps)
        if self.guide is None or self.guided_step is None:
            return structured
        last = min(num_steps, self.guide.num_steps)
        guided = sum(self.guide.is_guided(step) for step in range(last))
        return structured + self.guided_step.times(guided)


def guided_share(
    structured: float, guide: float, budget: float, *, variant: Literal["full", "stochastic"]
) -> float:
    """ρ with structured (1 + ρ) + w guide ρ = budget: the share of the original steps to guide.

    All three are FLOPs of the original steps: of the structured model, of its guide if it ran in
    all of them, and of everything. w = ½ for ``stochastic`` (the mean of α over a schedule), 1 for
    ``full``; ρ structured pays for replaying the guided tokens (arXiv 2407.09835, section 4).
    """
    weight = 0.5 if variant == "stochastic" else 1.0
    return (budget - structured) / (structured + weight * guide)


def solved_guide_steps(
    num_original_steps: int,
    step: TrainingFlops,
    guided_step: TrainingFlops,
    budget: float,
    *,
    variant: Literal["full", "stochastic"],
    count: FlopsKind = "model_flops",
) -> int:
    """The steps to guide, and to replay, so that all together cost ``budget`` FLOPs: the original
    ones times ``guided_share``, where the source is. ``guided_step`` is what a guide adds to a
    ``step``. Under 1 where nothing is left for a guide."""
    structured = num_original_steps * getattr(step, count)
    guide = num_original_steps * getattr(guided_step, count)
    return round(num_original_steps * guided_share(structured, guide, budget, variant=variant))


def plan_without_guide(
    num_original_steps: int,
    step: TrainingFlops,
    *,
    budget: float | None = None,
    count: FlopsKind = "model_flops",
) -> StepPlan:
    """As many steps as ``budget`` FLOPs buy (the control: more tokens); None: the original ones.

    Raises ``ConfigError`` where it buys none.
    """
    num_steps = num_original_steps
    if budget is not None:
        cost = getattr(step, count)
        num_steps = int(budget / cost)
        check(num_steps >= 1, f"budget.flops={budget:.4g} is under one step of {cost:.4g}")
    return StepPlan(num_steps, num_original_steps, None, step, None)


def plan_guided(
    num_original_steps: int,
    step: TrainingFlops,
    guided_step: TrainingFlops,
    guide: GuideSchedule,
    *,
    budget: float | None = None,
    count: FlopsKind = "model_flops",
) -> StepPlan:
    """Fixed-step mode: ``guide`` over the original steps. With ``budget``, fixed-FLOP mode: the
    guide's steps are solved (``guided_share``) and their tokens replayed at the end.

    Raises ``ConfigError`` where the budget is under the original steps' own cost, or buys more
    guided steps than there are.
    """
    if budget is None:
        num_steps = num_original_steps
    else:
        guide_steps = solved_guide_steps(
            num_original_steps, step, guided_step, budget, variant=guide.variant, count=count
        )
        check(
            guide_steps >= 1,
            f"budget.flops={budget:.4g} leaves nothing for a guide: the structured steps alone "
            f"cost {num_original_steps * getattr(step, count):.4g}",
        )
        check(
            guide_steps <= num_original_steps,
            f"budget.flops={budget:.4g} would guide {guide_steps / num_original_steps:.2f} times "
            "the original steps: state more batch.num_tokens",
        )
        guide = guide.replace(num_steps=guide_steps)
        num_steps = num_original_steps + guide_steps
    return StepPlan(num_steps, num_original_steps, guide, step, guided_step)

"""From a ladder to its runs: what each is, how long it trains, and at which rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from factorlm.errors import ConfigError
from factorlm.scaling.ladder.config import LadderFile
from factorlm.scaling.ladder.rates import best_rate, rate_at
from factorlm.train.config import TrainConfig
from factorlm.train.describe import Description, describe

Stage = Literal["main", "tune"]
MAX_GRID = 24
"""Rates of one family at one size; a grid that grows beyond has no best."""


@dataclass(frozen=True, kw_only=True)
class LadderRun:
    """One run of a ladder."""

    config: TrainConfig
    family: str
    size: str
    stage: Stage
    waits_for: tuple[str, ...] = ()
    """Runs whose losses decide its rate; until then its config has a provisional one."""

    @property
    def name(self) -> str:
        """The run's, unique in the ladder."""
        return self.config.name

    @property
    def rate(self) -> float:
        """The peak learning rate; provisional while ``waits_for`` something."""
        return self.config.optimizer.learning_rate


class Plan:
    """The runs of a ladder, given the losses of those that are done.

    Counting builds models on the meta device and is kept, so that a plan is cheap to make anew
    when another run is done.
    """

    def __init__(self, file: LadderFile) -> None:
        self.file = file
        self.ladder = file.ladder
        self._described: dict[str, Description] = {}
        self._configs: dict[tuple[str, float | None], TrainConfig] = {}
        self._tokens: dict[tuple[str, str], int] = {}

    def runs(self, losses: Mapping[str, float]) -> list[LadderRun]:
        """Every run that is known to be needed so far: tuning first, then seed by seed.

        ``losses`` has the last validation loss of runs that are done, by name; infinite for one
        that failed for good. Raises ``ConfigError``.
        """
        found = [*self._tuning(losses), *self._main(losses)]
        names = [run.name for run in found]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"ladder {self.ladder.name}: two runs are named {min(twice)!r}")
        return found

    def known(
        self, losses_of: Callable[[list[LadderRun]], Mapping[str, float]]
    ) -> tuple[list[LadderRun], dict[str, float]]:
        """The runs that are needed given those that are done, and the losses of these."""
        losses: dict[str, float] = {}
        while True:
            runs = self.runs(losses)
            found = dict(losses_of(runs))
            if found == losses:
                return runs, losses
            losses = found

    def describe(self, run: LadderRun) -> Description:
        """What it builds and costs; the rate makes no difference. Raises ``ConfigError`` naming the
        run."""
        key = str(run.config.replace(name="x", seed=0, labels={}).to_dict() | {"optimizer": None})
        key += run.config.optimizer.kind
        if key not in self._described:
            try:
                self._described[key] = describe(run.config)
            except ConfigError as error:
                where = f"ladder {self.ladder.name}, run {run.name}"
                raise ConfigError(f"{where}: {error}") from None
        return self._described[key]

    def _tuning(self, losses: Mapping[str, float]) -> Iterator[LadderRun]:
        for size in self.ladder.rate.sizes:
            for family in self.ladder.families:
                for rate in self._grid(family, size, losses):
                    yield self._run(family, size, "tune", rate=rate)

    def _main(self, losses: Mapping[str, float]) -> Iterator[LadderRun]:
        sizes = self.ladder.sizes
        budgets: Sequence[float | None] = self.ladder.tokens.flops or [None]
        for seed in range(max(self.ladder.num_seeds(size) for size in sizes)):
            for size in sizes:
                if seed < self.ladder.num_seeds(size):
                    for family in self.ladder.families:
                        for flops in budgets:
                            yield self._main_run(family, size, seed, flops, losses)

    def _main_run(
        self, family: str, size: str, seed: int, flops: float | None, losses: Mapping[str, float]
    ) -> LadderRun:
        if self.ladder.rate.rule == "recipe":
            return self._run(family, size, "main", seed=seed, flops=flops)
        rate, waits = self._rate(family, size, losses)
        return self._run(family, size, "main", seed=seed, flops=flops, rate=rate, waits_for=waits)

    def _rate(
        self, family: str, size: str, losses: Mapping[str, float]
    ) -> tuple[float, tuple[str, ...]]:
        """The rate of a family's runs at ``size``, or a provisional one and what decides it."""
        best: dict[int, float] = {}
        names: list[str] = []
        for tuned in self.ladder.rate.sizes:
            grid = {
                rate: _tune_name(family, tuned, rate) for rate in self._grid(family, tuned, losses)
            }
            names += grid.values()
            found = best_rate({rate: losses[name] for rate, name in grid.items() if name in losses})
            if found is not None:
                best[self._num_params(family, tuned)] = found
        waits = tuple(name for name in names if name not in losses)
        if waits or not best:  # none where all failed: there is no rate
            return self.ladder.rate.values[0], waits or tuple(names)
        return rate_at(self._num_params(family, size), best), ()

    def _num_params(self, family: str, size: str) -> int:
        rate = self.ladder.rate.values[0]
        return self.describe(self._run(family, size, "tune", rate=rate)).params.non_embedding

    def _grid(self, family: str, size: str, losses: Mapping[str, float]) -> list[float]:
        """The rates of a family at a tuned size, extended until the best is not at an edge; ends
        with the first rates whose loss is not known yet."""
        grid = sorted(self.ladder.rate.values)
        while len(grid) < MAX_GRID:
            found = [losses.get(_tune_name(family, size, rate)) for rate in grid]
            known = [loss for loss in found if loss is not None]
            if len(known) < len(grid) or not math.isfinite(min(known)):
                return grid
            best = known.index(min(known))
            if best == 0:
                grid.insert(0, _rounded(grid[0] * grid[0] / grid[1]))
            elif best == len(grid) - 1:
                grid.append(_rounded(grid[-1] * grid[-1] / grid[-2]))
            else:
                return grid
        return grid

    def _run(
        self,
        family: str,
        size: str,
        stage: Stage,
        *,
        seed: int = 0,
        rate: float | None = None,
        flops: float | None = None,
        waits_for: tuple[str, ...] = (),
    ) -> LadderRun:
        labels = {"ladder": self.ladder.name, "family": family, "size": size, "stage": stage}
        tokens = self._num_tokens(family, size)
        if stage == "tune":
            share, budgets = self.ladder.rate.token_share, self.ladder.tokens.flops
            flops = budgets[0] * share if budgets else None
            tokens = tokens if budgets else round(tokens * share)
        extra: dict[str, Any] = {
            "seed": seed,
            "labels": labels,
            "batch": {"num_tokens": tokens, "num_steps": None},
            "parallel": {"num_threads": self.ladder.executor.threads},
        }
        if rate is not None:
            extra["optimizer"] = {"learning_rate": rate}
        if flops:
            extra["budget"] = {"flops": flops, "count": "model_flops"}
        name = f"{family}-{size}" + (f"-{flops:g}" if flops else "") + f"-s{seed}"
        if stage == "tune":
            assert rate is not None
            name = _tune_name(family, size, rate)
        if (name, rate) not in self._configs:
            found = self.file.config(name, size, family, extra)
            run = LadderRun(config=found, family=family, size=size, stage=stage)
            if found.guide.variant == "auto":  # what it means is in the run's records
                meant = self.describe(run).config
                found = found.replace(guide=meant.guide, budget=meant.budget)
            self._configs[name, rate] = found
        config = self._configs[name, rate]
        return LadderRun(config=config, family=family, size=size, stage=stage, waits_for=waits_for)

    def _num_tokens(self, family: str, size: str) -> int:
        rule = self.ladder.tokens
        if rule.rule == "fixed":
            assert rule.num_tokens is not None
            return rule.num_tokens
        key = (size, family if rule.rule == "own" else "")
        if key not in self._tokens:
            self._tokens[key] = self._counted_tokens(size, family if key[1] else None)
        return self._tokens[key]

    def _counted_tokens(self, size: str, family: str | None) -> int:
        """By the parameters of a family's model, or of the size's dense twin; under ``iso_flops``
        only what the recipe has to state, since the budget decides."""
        one_step: dict[str, Any] = {"batch": {"num_steps": 1, "num_tokens": None}}
        one_step |= {"budget": {"flops": None}, "guide": {"variant": "none", "share": None}}
        if family is None:
            one_step["structure"] = {"structure": "dense"}
        config = self.file.config(f"{family or 'dense twin'} {size}", size, family, one_step)
        if self.ladder.tokens.rule == "iso_flops":
            return config.tokens_per_step
        count = describe(config).params.non_embedding
        return max(config.tokens_per_step, round(self.ladder.tokens.per_parameter * count))


def _tune_name(family: str, size: str, rate: float) -> str:
    return f"tune-{family}-{size}-{rate:g}"


def _rounded(rate: float) -> float:
    """Without the digits that only division made."""
    return float(f"{rate:.4g}")

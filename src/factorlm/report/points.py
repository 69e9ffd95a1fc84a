"""Runs as the points of scaling laws: a loss at training FLOPs, by family, size and seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from factorlm.report.facts import data_notes, differences
from factorlm.report.families import label_of
from factorlm.report.reading import ReportRun
from factorlm.report.tables import format_count
from factorlm.scaling.fit.data import SAME_SIZE

Count = Literal["executed_flops", "model_flops"]
COUNTS: dict[Count, tuple[str, str]] = {
    "executed_flops": ("executed_flops", "executed"),
    "model_flops": ("training_flops", "by the papers' convention"),
}
"""How FLOPs can be counted: the key in ``METRICS``, and in words."""
MAIN, TUNE = "main", "tune"
"""Stages of a ladder's runs: those that are fitted, and those that only find a learning rate."""
MAX_NAMED = 4
"""Runs that one message names."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Models of one size that were trained for equally many tokens: a run a seed."""

    size: str
    """As the ladder names it, else the number of parameters beside embedding and head."""
    num_params: int
    num_tokens: int
    """Trained on, replayed ones included; the mean over the seeds."""
    flops: float
    """Of one run; the mean over the seeds."""
    runs: tuple[str, ...]
    """Labels."""
    losses: tuple[float, ...]
    """Of the last evaluation of each of ``runs``, in nats per token."""

    @property
    def loss(self) -> float:
        """Geometric mean over the seeds, as fits of log(loss) take it."""
        return math.exp(statistics.fmean(map(math.log, self.losses)))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


@dataclass(frozen=True, kw_only=True)
class FamilyPoints:
    """All points of one family, in order of FLOPs."""

    name: str
    points: tuple[Point, ...]

    @property
    def sizes(self) -> tuple[str, ...]:
        """Each once, in order of the FLOPs that it first has."""
        return tuple(dict.fromkeys(point.size for point in self.points))

    @property
    def is_grid(self) -> bool:
        """Whether sizes and tokens vary apart from each other: a size was trained for several
        numbers of tokens, or several sizes on one budget."""
        flops = [point.flops for point in self.points]
        has_budget = any(b <= SAME_SIZE * a for a, b in itertools.pairwise(flops))
        return has_budget or len(self.sizes) < len(self.points)

    @property
    def frontier(self) -> tuple[Point, ...]:
        """Of a grid, the points with a lower loss than all that cost as much or less; else all."""
        if not self.is_grid:
            return self.points
        return tuple(
            point
            for point in self.points
            if not any(
                other.loss < point.loss and other.flops <= SAME_SIZE * point.flops
                for other in self.points
            )
        )

    @property
    def fitted_sizes(self) -> tuple[str, ...]:
        """Those of ``frontier``, each once."""
        return tuple(dict.fromkeys(point.size for point in self.frontier))

    @property
    def compute_and_loss(self) -> tuple[np.ndarray, np.ndarray]:
        """FLOPs and loss of the runs of ``frontier``, each (num_runs,)."""
        pairs = [(point.flops, loss) for point in self.frontier for loss in point.losses]
        compute, losses = zip(*pairs, strict=True)
        return np.array(compute), np.array(losses)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What runs give to fit."""

    families: dict[str, FamilyPoints]
    count: Count
    """How FLOPs are counted."""
    notes: tuple[str, ...]
    """What was left out and what keeps losses from being compared, in plain sentences."""


@dataclass(frozen=True)
class _Run:
    """A run with the numbers that place it."""

    run: ReportRun
    key: tuple[str, str, int, str]
    """Family, size, tokens, seed."""
    flops: float
    loss: float
    tokens: int


def study_of(runs: Sequence[ReportRun], count: Count | None = None) -> Study:
    """The points of finished runs, and why others are left out.

    ``count`` None takes the executed FLOPs where every run that is used recorded them, and else
    the papers' convention.
    """
    usable, notes = _usable(runs)
    if count is None:
        known = all(run.metrics["executed_flops"] is not None for run in usable)
        count = "executed_flops" if known else "model_flops"
    counted = [run for run in usable if _is_positive(run.metrics[COUNTS[count][0]])]
    if len(counted) < len(usable):
        missing = [run.label for run in usable if run not in counted]
        notes.append(f"Left out, {count} not recorded: {_named(missing)}.")
    placed = _with_equal_tokens([_placed(run, count) for run in counted])
    single, doubled = _without_duplicates(placed)
    families: dict[str, list[Point]] = {}
    for point_runs in _grouped(single, lambda run: run.key[:3]).values():
        families.setdefault(point_runs[0].key[0], []).append(_point(point_runs))
    return Study(
        families={
            name: FamilyPoints(name=name, points=tuple(sorted(points, key=lambda p: p.flops)))
            for name, points in families.items()
        },
        count=count,
        notes=(*notes, *doubled, *_cautions([run.run for run in single])),
    )


def stage_of(run: ReportRun) -> str:
    """What the run is for, as its ladder says it; ``main`` for a run of none."""
    return label_of(run.summary.run.config, "stage") or MAIN


def _usable(runs: Sequence[ReportRun]) -> tuple[list[ReportRun], list[str]]:
    """Runs with a loss to fit, and a sentence for each reason why others have none."""
    usable, reasons = [], dict[str, list[str]]()
    for run in runs:
        reason = _refusal(run)
        if reason is None:
            usable.append(run)
        else:
            reasons.setdefault(reason, []).append(run.label)
    return usable, [f"Left out, {reason}: {_named(names)}." for reason, names in reasons.items()]


def _refusal(run: ReportRun) -> str | None:
    last = run.summary.last
    if stage_of(run) != MAIN:
        return f"of stage {stage_of(run)}, not {MAIN}"
    if not run.summary.is_finished:
        return "not finished"
    if last is None:
        return "without an evaluation"
    if last.guided:
        return "their last evaluation was guided, which no saved model is"
    if last.step < run.num_steps_done:
        return "their last evaluation was before their last step"
    return None if _is_positive(last.loss) else "their last loss is not finite and above 0"


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _placed(run: ReportRun, count: Count) -> _Run:
    record = run.summary.run
    size = label_of(record.config, "size") or format_count(record.num_non_embedding_params)
    flops, last = run.metrics[COUNTS[count][0]], run.summary.last
    assert flops is not None
    assert last is not None
    key = (run.family, size, last.num_tokens, str(record.config.get("seed")))
    done = last.num_tokens / run.summary.num_tokens  # above 1 where thinned records lack the end
    return _Run(run=run, key=key, flops=flops * done, loss=last.loss, tokens=last.num_tokens)


def _with_equal_tokens(runs: Sequence[_Run]) -> list[_Run]:
    """Nearly equal numbers of tokens of a family's size as the least of them."""
    of_size: dict[tuple[str, str], list[int]] = {}
    for family, size, tokens, _ in sorted(run.key for run in runs):
        known = of_size.setdefault((family, size), [tokens])
        if tokens > SAME_SIZE * known[-1]:
            known.append(tokens)
    found = []
    for run in runs:
        family, size, tokens, seed = run.key
        least = max(known for known in of_size[family, size] if known <= tokens)
        found.append(dataclasses.replace(run, key=(family, size, least, seed)))
    return found


def _without_duplicates(runs: Sequence[_Run]) -> tuple[list[_Run], list[str]]:
    """One run for each family, size, number of tokens and seed: the one of lowest loss."""
    kept, notes = [], []
    for key, same in _grouped(runs, lambda run: run.key).items():
        best = min(same, key=lambda run: run.loss)
        kept.append(best)
        if len(same) > 1:
            family, size, tokens, seed = key
            configs = [{**run.run.summary.run.config, "name": ""} for run in same]
            fields = ", ".join(differences(configs))
            notes.append(
                f"{len(same)} runs of {family}, size {size}, {format_count(tokens)} tokens and "
                f"seed {seed}: only {best.run.label}, of lowest loss, is fitted; they differ in "
                f"{fields or 'nothing'}."
            )
    return kept, notes


def _grouped(runs: Sequence[_Run], key: Callable[[_Run], Any]) -> dict[Any, list[_Run]]:
    groups: dict[Any, list[_Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _point(runs: Sequence[_Run]) -> Point:
    return Point(
        size=runs[0].key[1],
        num_params=runs[0].run.summary.run.num_params,
        num_tokens=round(statistics.fmean(run.tokens for run in runs)),
        flops=statistics.fmean(run.flops for run in runs),
        runs=tuple(run.run.label for run in runs),
        losses=tuple(run.loss for run in runs),
    )


def _cautions(runs: Sequence[ReportRun]) -> Iterator[str]:
    """What keeps losses from being compared."""
    for note in data_notes([run.summary.run.config for run in runs]):
        yield f"{note}."
    texts = sorted({run.summary.last.num_eval_tokens for run in runs if run.summary.last})
    if len(texts) > 1:
        counts = ", ".join(f"{tokens:,}" for tokens in texts)
        yield f"The last evaluations are over different amounts of text: {counts} tokens."


def _named(labels: Sequence[str]) -> str:
    rest = len(labels) - MAX_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(labels[:MAX_NAMED]) + more

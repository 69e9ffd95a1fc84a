"""What the records of training runs say, side by side."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorlm.errors import DataError, did_you_mean
from factorlm.records import (
    LOSS_SPIKE,
    RECORDS_FILE,
    EvalRecord,
    EventRecord,
    GenerationRecord,
    MonitorRecord,
    Record,
    RecordFile,
    RunRecord,
    StepRecord,
)
from factorlm.report.tables import Table, format_count, format_scientific, format_seconds

VALIDATION = "validation"
"""The ``EvalRecord.source`` of the evaluations that training makes."""
MAX_SPIKES = 4
"""Of one run that a note lists."""
UNFINISHED = " *"
"""Behind the name of a run that has not done all its steps."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run: what it is, how far it came, and its records."""

    label: str
    """Its name; where several runs have that name, its path."""
    run: RunRecord
    steps: tuple[StepRecord, ...]
    """At least one."""
    evals: tuple[EvalRecord, ...]
    """On the validation split, while training."""
    generation: GenerationRecord | None
    """The newest."""
    is_finished: bool
    monitors: tuple[MonitorRecord, ...] = ()
    spikes: tuple[EventRecord, ...] = ()
    """Of the training loss."""

    @property
    def structure(self) -> str:
        """Of the FFN, as the recipe says it."""
        return structure_label(self.run.config.get("structure", {}))

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far."""
        return self.steps[-1].num_tokens

    @property
    def training_flops(self) -> float:
        """Spent so far, by the papers' convention; a guide's included."""
        spent = self.steps[-1].model_flops
        return 3 * self.run.forward_flops_per_token * self.num_tokens if spent is None else spent

    @property
    def executed_flops(self) -> float | None:
        """Spent so far, as run; None where the records are of before it was counted."""
        return self.steps[-1].executed_flops

    @property
    def train_seconds(self) -> float:
        """Time of all steps; evaluation and saving left out."""
        return seconds_of(self.steps)[-1]

    @property
    def train_tokens_per_second(self) -> float:
        """At the median step."""
        return 1000 * self.run.tokens_per_step / statistics.median(s.step_ms for s in self.steps)

    @property
    def best(self) -> EvalRecord | None:
        """The one with the lowest loss of the evaluations over the most text, guided ones left
        out: no saved model has guides."""
        evals = [record for record in self.evals if not record.guided]
        most = max((record.num_eval_tokens for record in evals), default=0)
        whole = [record for record in evals if record.num_eval_tokens == most]
        return min(whole, key=lambda record: record.loss, default=None)

    @property
    def curve(self) -> tuple[EvalRecord, ...]:
        """The evaluations over equally much text, the ones that training makes on the way."""
        least = min((record.num_eval_tokens for record in self.evals), default=0)
        return tuple(record for record in self.evals if record.num_eval_tokens == least)

    @property
    def last(self) -> EvalRecord | None:
        """The newest evaluation."""
        return self.evals[-1] if self.evals else None


def read_run(path: str | os.PathLike[str]) -> RunSummary:
    """Read a run's folder, or a copy of its ``records.jsonl``.

    Raises ``DataError`` if there is no such run, or it has no step yet.
    """
    run = summarize(list(RecordFile(_records_path(Path(path)))))
    if run is None:
        raise DataError(f"{path}: its records hold no training step yet")
    return run


def summarize(records: Sequence[Record]) -> RunSummary | None:
    """What the records of one run say; None if they hold no run, or none of its steps."""
    runs = _of_type(records, RunRecord)
    steps = _of_type(records, StepRecord)
    if not runs or not steps:
        return None
    generations, events = _of_type(records, GenerationRecord), _of_type(records, EventRecord)
    return RunSummary(
        label=runs[-1].name,
        run=runs[-1],
        steps=tuple(steps),
        evals=tuple(e for e in _of_type(records, EvalRecord) if e.source == VALIDATION),
        generation=next((g for g in reversed(generations) if g.batch_size == 1), None),
        is_finished=any(event.event == "finished" for event in events),
        monitors=tuple(_of_type(records, MonitorRecord)),
        spikes=tuple(event for event in events if event.event == LOSS_SPIKE),
    )


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[RunSummary]:
    """``read_run`` of each, under labels that tell them apart."""
    runs = [read_run(path) for path in paths]
    labels = distinct_labels([run.label for run in runs], paths)
    return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def distinct_labels(names: Sequence[str], paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The names, or the path where another run has the same name."""
    counts = Counter(names)
    pairs = zip(names, paths, strict=True)
    return [os.fspath(path) if counts[name] > 1 else name for name, path in pairs]


def seconds_of(steps: Sequence[StepRecord]) -> list[float]:
    """Training time until the end of each step. Records that were thinned out leave steps out:
    the next one that is there stands for them."""
    before = [0, *(step.step for step in steps)]
    gaps = (step.step - earlier for step, earlier in zip(steps, before, strict=False))
    times = (step.step_ms * gap / 1000 for step, gap in zip(steps, gaps, strict=True))
    return list(itertools.accumulate(times))


def _records_path(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        siblings = [sibling.name for sibling in path.parent.glob("*")]
        raise DataError(f"{path}: no such run.{did_you_mean(path.name, siblings)}")
    if not (path / RECORDS_FILE).is_file():
        raise DataError(f"{path}: not a run: it holds no {RECORDS_FILE}")
    return path / RECORDS_FILE


def _of_type(records: Sequence[Record], kind: type[Any]) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def structure_label(section: Mapping[str, Any]) -> str:
    """A recipe's ``structure`` section in a few words: ``low_rank, 32%``, ``low_rank, rank 64``."""
    section = {key: value for key, value in section.items() if value is not None}
    if "layers" in section:
        return "by layer"
    fields = [str(section.get("structure", "dense"))]
    if "param_ratio" in section:
        fields.append(f"{section['param_ratio']:.0%}")
    if section.get("keep_first_dense") is False:
        fields.append("first too")
    said = {"structure", "param_ratio", "keep_first_dense", "version", "multiple_of"}
    fields += [f"{key.removeprefix('num_')} {section[key]}" for key in section if key not in said]
    return ", ".join(fields)


@dataclass(frozen=True)
class Metric:
    """A row of the comparison."""

    key: str
    """In JSON, with its unit."""
    title: str
    value: Callable[[RunSummary], float | None]
    write: Callable[[float], str]
    is_log: bool = False
    """Compared by difference: its exponential is what has a ratio."""

    def relation(self, value: float | None, first: float | None) -> float | None:
        """``value`` relative to the first run's."""
        if value is None or first is None or (first == 0 and not self.is_log):
            return None
        return value - first if self.is_log else value / first


def _of_eval(record: EvalRecord | None, name: str) -> float | None:
    return None if record is None else getattr(record, name)


METRICS = (
    Metric("num_params", "parameters", lambda r: r.run.num_params, format_count),
    Metric("num_ffn_params", "FFN parameters", lambda r: r.run.num_ffn_params, format_count),
    Metric("num_tokens", "training tokens", lambda r: r.num_tokens, format_count),
    Metric("training_flops", "training FLOPs", lambda r: r.training_flops, format_scientific),
    Metric("executed_flops", "executed FLOPs", lambda r: r.executed_flops, format_scientific),
    Metric(
        "best_validation_loss",
        "best validation loss",
        lambda r: _of_eval(r.best, "loss"),
        "{:.4f}".format,
        is_log=True,
    ),
    Metric(
        "last_validation_loss",
        "last validation loss",
        lambda r: _of_eval(r.last, "loss"),
        "{:.4f}".format,
        is_log=True,
    ),
    Metric(
        "perplexity", "perplexity (best)", lambda r: _of_eval(r.best, "perplexity"), "{:.2f}".format
    ),
    Metric(
        "bits_per_byte",
        "bits per byte (best)",
        lambda r: _of_eval(r.best, "bits_per_byte"),
        "{:.4f}".format,
    ),
    Metric(
        "train_tokens_per_second",
        "training tokens/s",
        lambda r: r.train_tokens_per_second,
        "{:,.0f}".format,
    ),
    Metric(
        "generation_tokens_per_second",
        "generation tokens/s",
        lambda r: None if r.generation is None else r.generation.tokens_per_second,
        "{:,.1f}".format,
    ),
    Metric("train_seconds", "training time", lambda r: r.train_seconds, format_seconds),
)


def comparison_table(runs: Sequence[RunSummary]) -> Table:
    """A column a run; after each but the first, what it is relative to the first."""
    first = runs[0]
    header, structures, steps = [""], ["structure"], ["steps"]
    for index, run in enumerate(runs):
        name = run.label + ("" if run.is_finished else UNFINISHED)
        header += [name, "vs first"] if index else [name]
        structures += [run.structure, ""] if index else [run.structure]
        steps += [_progress(run), ""] if index else [_progress(run)]
    rows = [tuple(structures), *(_row(metric, runs, first) for metric in METRICS), tuple(steps)]
    return Table(header=tuple(header), rows=tuple(rows))


def comparison_tables(runs: Sequence[RunSummary], width: int | None) -> list[Table]:
    """``comparison_table`` in tables of at most ``width`` characters, each with the first run."""
    tables: list[Table] = []
    block = [runs[0]]
    for run in runs[1:]:
        wider = comparison_table([*block, run]).plain()
        if width is not None and len(block) > 1 and len(wider.splitlines()[1]) > width:
            tables.append(comparison_table(block))
            block = [runs[0]]
        block.append(run)
    return [*tables, comparison_table(block)]


def _row(metric: Metric, runs: Sequence[RunSummary], first: RunSummary) -> tuple[str, ...]:
    cells = [metric.title]
    for index, run in enumerate(runs):
        value = metric.value(run)
        cells.append("–" if value is None else metric.write(value))
        if index:
            relation = metric.relation(value, metric.value(first))
            cells.append(_relation(metric, relation))
    return tuple(cells)


def _relation(metric: Metric, relation: float | None) -> str:
    if relation is None:
        return ""
    return f"{relation:+.4f}" if metric.is_log else f"{relation:.2f}x"


def _progress(run: RunSummary) -> str:
    done, total = run.steps[-1].step, run.run.num_steps
    return f"{done:,}" if run.is_finished else f"{done:,} of {total:,}"


def comparison_json(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """One object a run: the metrics, and under ``relative`` those relative to the first run."""
    return [
        {
            "name": run.label,
            "structure": run.structure,
            "num_steps_done": run.steps[-1].step,
            "num_steps": run.run.num_steps,
            "is_finished": run.is_finished,
            **{metric.key: finite(metric.value(run)) for metric in METRICS},
            "relative": {
                metric.key: finite(metric.relation(metric.value(run), metric.value(runs[0])))
                for metric in METRICS
            },
        }
        for run in runs
    ]


def finite(value: float | None) -> float | None:
    """None for what JSON cannot say."""
    return value if value is not None and math.isfinite(value) else None


def comparison_notes(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader has to know: unfinished runs, data on which losses cannot be compared, and
    loss spikes."""
    notes = [] if all(run.is_finished for run in runs) else [f"{UNFINISHED.strip()} unfinished"]
    for field in ("path", "context_length", "tokenizer"):
        values = [str(run.run.config.get("data", {}).get(field)) for run in runs]
        if len(set(values)) > 1:
            notes.append(f"data.{field} differs: {', '.join(values)}")
    return notes + [f"{run.label}: {_spikes(run)}" for run in runs if run.spikes]


def _spikes(run: RunSummary) -> str:
    """``loss spikes at step 71 (model.layers.1.mlp.c_fc), step 90, 2 more``."""
    found = []
    for event in run.spikes[:MAX_SPIKES]:
        layer = event.detail.get("layer")
        found.append(f"step {event.step:,}" + (f" ({layer})" if layer else ""))
    if len(run.spikes) > MAX_SPIKES:
        found.append(f"{len(run.spikes) - MAX_SPIKES} more")
    return f"loss spike{'s' if len(run.spikes) > 1 else ''} at {', '.join(found)}"

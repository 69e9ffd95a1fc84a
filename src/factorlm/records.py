"""Facts about runs, benchmarks and evaluations, as typed JSON records, one a line.

Fits, comparisons and reports read only these; nothing here imports torch. A record file is
append-only. Each line carries ``type`` and ``format_version``, so that a reader can skip what it
does not know.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from factorlm.errors import DataError
from factorlm.registry import Registry
from factorlm.storage import atomic_write_bytes, fileops, storage_errors

FORMAT_VERSION = 1
RECORDS_FILE = "records.jsonl"

LOSS_SPIKE = "loss spike"
"""The ``EventRecord.event`` of a loss far over those before it."""

RECORD_TYPES: Registry[type[Record]] = Registry("record type")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records: a plain dataclass of JSON types, units in the field names."""

    type: ClassVar[str] = ""

    def to_json(self) -> str:
        """One line of JSON, without the line break."""
        head = {"type": self.type, "format_version": FORMAT_VERSION}
        return json.dumps(head | dataclasses.asdict(self), ensure_ascii=False)


def record_type(name: str) -> Any:
    """Class decorator: register a record under the ``type`` that its lines carry."""

    def add(cls: type[Record]) -> type[Record]:
        cls.type = name
        return RECORD_TYPES.register(name)(cls)

    return add


@record_type("run")
@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """What a training run is: written once, when it starts."""

    name: str
    config: dict[str, Any]
    """The resolved recipe."""
    environment: dict[str, Any]
    """Versions, hardware, number of threads and processes, commit."""
    num_params: int
    """All parameters; a tied head counts once."""
    num_ffn_params: int
    """Weights of the FFN linears (structured or dense), without biases."""
    num_non_embedding_params: int
    forward_flops_per_token: float
    training_flops: float
    """Of the whole run, by the papers' convention: 3 x forward x tokens, and 3 x its matmul x
    tokens for a guide."""
    num_steps: int
    tokens_per_step: int
    """Tokens that are predicted in one optimizer step, over all processes."""
    executed_flops: float | None = None
    """Of the whole run, what is really run: recomputation, merged guides and the optimizer's
    matmuls included. None in records of before it was counted."""
    num_original_steps: int | None = None
    """Steps that read new data where the run replays its guided tokens; else those that the
    recipe's batch states."""
    num_guide_steps: int = 0
    """The first so many steps have a guide."""


@record_type("step")
@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One optimizer step (1-based: ``step`` steps are done)."""

    step: int
    num_tokens: int
    """Tokens trained on so far."""
    loss: float
    """Mean training loss of this step, nats per token."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    step_ms: float
    """Wall time of this step, evaluation and saving left out."""
    model_flops: float | None = None
    """Spent so far, by the papers' convention."""
    executed_flops: float | None = None
    """Spent so far, as run."""
    guide_alpha: float | None = None
    """The guide's share in this step; None without a guide."""
    guide_skipped: bool = False
    """The guide was left out of this step (the stochastic variant)."""


@record_type("eval")
@dataclass(frozen=True, kw_only=True)
class EvalRecord(Record):
    """Loss on held-out text."""

    step: int
    num_tokens: int
    """Tokens trained on so far."""
    source: str
    """The split or text that was evaluated, e.g. ``validation``."""
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where the bytes of the evaluated text are not known."""
    num_eval_tokens: int
    seconds: float
    guided: bool = False
    """The model had its guides; such an evaluation is not compared."""


class LayerValues(TypedDict):
    """One structured layer in a ``MonitorRecord``."""

    factor_norms: dict[str, float]
    """Spectral norm of each factor after the step, in order of application; of a block-diagonal
    one, its largest block's."""
    product_rms: float
    """Root mean square of the entries of the product of the factors, after the step."""
    change_rms: float
    """Root mean square of what the step added to the entries of the product."""
    grad_norm: float
    """Of the layer's own parameters, before clipping."""


@record_type("monitor")
@dataclass(frozen=True, kw_only=True)
class MonitorRecord(Record):
    """What one optimizer step did to the structured layers."""

    step: int
    guide_alpha: float | None
    """The guide's share in this step; None without a guide."""
    layers: dict[str, LayerValues]
    """By the names that files have, in the model's order."""


@record_type("generation")
@dataclass(frozen=True, kw_only=True)
class GenerationRecord(Record):
    """Speed of one generation."""

    prompt: str
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    seconds: float
    tokens_per_second: float
    """Of this text alone, at the median token after the first."""
    batch_size: int = 1
    """Number of texts that were generated together."""
    prefill_seconds: float | None = None
    """Until the first new token of all of them; None in records of before it was kept."""


class CaseTimes(TypedDict):
    """One case of a ``BenchmarkRecord``."""

    median_ms: float
    """Wall time of one call, the middle of all rounds."""
    spread_ms: float
    """Distance between the quartiles of the rounds."""
    speedup: float
    """The baseline's time a token by this one's, the middle of the ratios within a round."""
    ideal_speedup: float | None
    """What the FLOPs or bytes allow; None where nothing says."""
    num_tokens: int | None
    """Tokens that one call makes or reads, where cases differ in it; speed-ups are per token."""


class BarResult(TypedDict):
    """A promise about one figure, beside the figure."""

    name: str
    value: float
    limit: float
    at_most: bool
    """The value has to be at most ``limit``; else at least."""


@record_type("benchmark")
@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord(Record):
    """Cases that were timed alternately in one setting, their results checked before."""

    benchmark: str
    """``kernel``, ``ffn``, ..."""
    settings: dict[str, Any]
    """Shape, tokens, dtype, pass, ...: what the cases have in common."""
    environment: dict[str, Any]
    baseline: str
    rounds: int
    cases: dict[str, CaseTimes]
    bars: list[BarResult] = field(default_factory=list)


@record_type("published")
@dataclass(frozen=True, kw_only=True)
class PublishedRecord(Record):
    """What others printed about one model of one size."""

    table: str
    """Where it stands: ``scaling``, ``main``, ``self-guided``, ``wide``, ..."""
    size: str | None
    """``s``, ``m``, ``l``, ``xl``; None where it is no model."""
    model: str
    values: dict[str, float]
    """Units are in the keys."""
    certainty: dict[str, str]
    """Of each value. A: read exactly from a printed table; B: digitised from a figure; C: stated in
    the text; D: a third party's transcription; K: computed by a formula that reproduces what is
    printed."""
    note: str = ""


@record_type("event")
@dataclass(frozen=True, kw_only=True)
class EventRecord(Record):
    """Something that happened to a run: resumed, saved, interrupted, finished, a loss spike."""

    event: str
    step: int
    detail: dict[str, Any] = field(default_factory=dict)


class RecordFile:
    """An append-only JSONL file of records."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, record: Record) -> None:
        """Write one line and hand it to the operating system; a half-written last line goes first.

        Raises ``StorageError`` naming the file.
        """
        line = (record.to_json() + "\n").encode()
        with storage_errors(self.path), self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # what another process is writing is not half-written
            _end_last_line(file)
            fileops.write(file, line)

    def drop_after(self, step: int, evaluated_step: int) -> None:
        """Forget what a run that goes back to ``step`` finds again: steps, monitors and loss spikes
        after it, evaluations after ``evaluated_step``. A half-written last line goes too."""
        if not self.path.exists():
            return
        kept = [
            line + b"\n"
            for line, record in self._lines()
            if not _is_found_again(record, step, evaluated_step)
        ]
        atomic_write_bytes(self.path, b"".join(kept))

    def __iter__(self) -> Iterator[Record]:
        """All known records in order. A half-written last line is left out.

        Raises ``DataError`` naming file and line for a damaged line before the last.
        """
        return (record for _, record in self._lines() if record is not None)

    def _lines(self) -> Iterator[tuple[bytes, Record | None]]:
        """Every line with its record, None where that is not known."""
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield line, _parse(line)
            except _DAMAGE as error:
                if number == len(lines):
                    return
                raise DataError(
                    f"{self.path}:{number}: not a record, which is a JSON object with type, "
                    f"format_version and the fields of its type: {error!r}"
                ) from None


def _end_last_line(file: FileIO) -> None:
    """Give a last line its break if it lacks nothing else, or cut off what a crash or a full disk
    left of it."""
    size = os.fstat(file.fileno()).st_size
    if size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n":
        return
    last = os.pread(file.fileno(), size, 0).rpartition(b"\n")[2]
    try:
        _parse(last)
    except _DAMAGE:
        os.ftruncate(file.fileno(), size - len(last))
    else:
        fileops.write(file, b"\n")


def _is_found_again(record: Record | None, step: int, evaluated_step: int) -> bool:
    """Whether a run that goes back to ``step`` writes ``record`` once more."""
    if isinstance(record, EvalRecord):
        return record.step > evaluated_step
    if isinstance(record, EventRecord):
        return record.event == LOSS_SPIKE and record.step > step
    return isinstance(record, StepRecord | MonitorRecord) and record.step > step


_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What ``_parse`` raises for a line that is no record."""


def _parse(line: bytes) -> Record | None:
    values = json.loads(line)
    name = values.pop("type")
    version = values.pop("format_version")
    if name not in RECORD_TYPES or version > FORMAT_VERSION:
        return None
    return RECORD_TYPES[name](**values)

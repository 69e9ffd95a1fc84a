"""Turn text into token shards: ``prepare(PrepareConfig(...)) -> TokenDataset``.

The output is a function of the input and the config alone: not of the number of workers, nor of
where an earlier attempt was stopped. While it runs, ``progress.json`` says how much of each stream
is durable and where reading goes on; the manifest, written last, replaces it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from factorlm.data.config import PrepareConfig
from factorlm.data.dataset import KIND, TOKENIZER_FOLDER, TokenDataset, open_dataset
from factorlm.data.planning import Planner, Stream, Task
from factorlm.data.progress import (
    PROGRESS_FILE,
    Progress,
    check_signature,
    describe_inputs,
    start_or_resume,
)
from factorlm.data.shards import SHARD_FOLDER, StreamState, StreamWriter, token_dtype
from factorlm.data.sources import open_source
from factorlm.data.splits import TRAIN, VALIDATION, ByDocument, SplitRule, TailOfText, WholeSource
from factorlm.data.tokenizer import TextTokenizer, load_tokenizer
from factorlm.data.tokenizer_building import build_tokenizer
from factorlm.data.workers import EncoderPool
from factorlm.errors import DataError
from factorlm.storage import (
    MANIFEST_FILE,
    atomic_folder,
    describe_file,
    fileops,
    folder_lock,
    storage_errors,
    write_manifest,
)

SAMPLE_BYTES = 32 * 2**20
"""Text that a BPE is trained on; training takes about 6 s and 250 MB."""
COMMIT_BYTES = 64 * 2**20
"""Text after which what was done is made durable, besides at the end of each shard."""
TASKS_PER_WORKER = 3
MAX_WORKERS = 16
"""Unless told otherwise: each needs about 60 MB."""
MAX_WORKERS_WITHOUT_CUTS = 2
"""Of a tokenizer that encodes whole documents, up to 400 MB each."""
MAX_BAD_SHARE = Fraction(1, 1000)
MIN_RECORDS_TO_JUDGE = 10_000


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is, for a progress bar."""

    input_bytes: int
    """Read of the input files."""
    total_input_bytes: int | None
    """Of all input files; None if a source is streamed."""
    num_text_bytes: int
    num_tokens: int


OnProgress = Callable[[PrepareProgress], None]


def prepare(config: PrepareConfig, on_progress: OnProgress | None = None) -> TokenDataset:
    """Write token shards, or go on with them, and open them; finished ones are only opened.

    Raises ``DataError`` for text that cannot be read, ``ConfigError`` for a folder that holds the
    preparation of something else, ``StorageError`` if the folder is in use or cannot be written.
    """
    output = Path(config.output)
    with folder_lock(output, owner="factorlm prepare"):
        job = _Preparation(config, on_progress)
        if not (output / MANIFEST_FILE).exists():
            job.run()
        return job.finished()


def default_workers(tokenizer: TextTokenizer) -> int:
    """One process a core, as far as memory stays below about 1.5 GB in sum."""
    limit = MAX_WORKERS if tokenizer.cuts_text else MAX_WORKERS_WITHOUT_CUTS
    return min(os.cpu_count() or 1, limit)


class _Preparation:
    """One attempt at a preparation, under the lock of its folder."""

    progress: Progress
    tokenizer: TextTokenizer

    def __init__(self, config: PrepareConfig, on_progress: OnProgress | None) -> None:
        specs = [*config.sources, *config.val_sources]
        self.config = config
        self.output = Path(config.output)
        self.sources = [open_source(spec) for spec in specs]
        self.inputs, self.modified = describe_inputs(self.sources)
        self.on_progress = on_progress
        self.writers: dict[str, StreamWriter] = {}
        self.committed_bytes = 0

    @property
    def signature(self) -> dict[str, Any]:
        """What decides the output. ``tolerant`` may be added after a bad record was met."""
        values = self.config.to_dict()
        for name in ("output", "workers", "tolerant"):
            del values[name]
        return values | {"inputs": self.inputs}

    def run(self) -> None:
        """Write tokenizer, shards and manifest."""
        self.progress = start_or_resume(self.output, self.signature, self.modified)
        self.committed_bytes = self.progress.num_text_bytes
        rules = self._rules()
        config = self.config
        planner = Planner(self.sources, rules, config.text_column, config.tolerant)
        self.tokenizer = self._tokenizer(planner)
        workers = config.workers or default_workers(self.tokenizer)
        with EncoderPool(self.output / TOKENIZER_FOLDER, workers) as pool, self._open_writers():
            waiting: deque[tuple[Task, Future[list[np.ndarray]]]] = deque()
            for task in planner.tasks(self.tokenizer, self.progress.cursor):
                waiting.append((task, pool.submit([piece.data for piece in task.pieces])))
                if len(waiting) > TASKS_PER_WORKER * workers:
                    self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())
            self._judge_rejected(0)
            for writer in self.writers.values():
                writer.close()
            self._commit()
        self._check_splits()
        write_manifest(self.output, self._facts(rules), self._files())

    def finished(self) -> TokenDataset:
        """Open the finished folder if it is what the config asks for, without leftovers."""
        dataset = open_dataset(self.output)
        found = dataset.manifest.extra["config"]
        check_signature(self.output, "a finished preparation", found, self.signature)
        with storage_errors(self.output):
            if (self.output / PROGRESS_FILE).exists():
                fileops.remove(self.output / PROGRESS_FILE)
        return dataset

    def _rules(self) -> list[SplitRule]:
        config = self.config
        rules: list[SplitRule] = []
        for number, source in enumerate(self.sources[: len(config.sources)]):
            if not config.fraction:
                rules.append(WholeSource(TRAIN))
            elif source.is_single_document(config.text_column):
                rules.append(TailOfText(config.fraction))
            else:
                rules.append(ByDocument(config.fraction, config.seed, number))
        return rules + [WholeSource(VALIDATION)] * len(config.val_sources)

    def _tokenizer(self, planner: Planner) -> TextTokenizer:
        folder = self.output / TOKENIZER_FOLDER
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                sample = planner.sample(SAMPLE_BYTES)
                config = self.config
                build_tokenizer(config.tokenizer, temporary, sample, eos_token=config.eos_token)
        return load_tokenizer(folder)

    @contextmanager
    def _open_writers(self) -> Iterator[None]:
        """Writers of all streams that were begun, their files closed at the end."""
        try:
            for stem in list(self.progress.streams):
                self._writer(stem)
            yield
        finally:
            for writer in self.writers.values():
                writer.abandon()

    def _writer(self, stem: str) -> StreamWriter:
        if stem not in self.writers:
            state = self.progress.streams.setdefault(stem, StreamState())
            self.writers[stem] = StreamWriter(
                self.output, stem, self.tokenizer.vocab_size, self.config.shard_tokens, state
            )
        return self.writers[stem]

    def _take(self, task: Task, future: Future[list[np.ndarray]]) -> None:
        """Write the ids of the next task, and make all durable when it is time."""
        shard_finished = False
        for piece, ids in zip(task.pieces, future.result(), strict=True):
            writer = self._writer(_stem(piece.stream))
            ends = [self.tokenizer.eos_id] * piece.ends_document
            shard_finished |= writer.append(np.append(ids, ends).astype(np.int64))
            writer.state.num_documents += piece.begins_document
            writer.state.num_text_bytes += len(piece.data)
        progress = self.progress
        progress.cursor = task.cursor
        progress.num_records += task.num_records
        progress.num_empty += task.num_empty
        progress.reject(task.rejected)
        progress.num_text_bytes += task.num_text_bytes
        self._judge_rejected(MIN_RECORDS_TO_JUDGE)
        if shard_finished or progress.num_text_bytes - self.committed_bytes >= COMMIT_BYTES:
            self._commit()
        self._report(task.position)

    def _commit(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        with storage_errors(self.output):
            fileops.fsync_path(self.output / SHARD_FOLDER)
        self.progress.save(self.output)
        self.committed_bytes = self.progress.num_text_bytes

    def _judge_rejected(self, min_records: int) -> None:
        rejected, records = self.progress.rejected, self.progress.num_records
        total = sum(rejected.values())
        if total > MAX_BAD_SHARE * max(records, min_records):
            reasons = ", ".join(f"{rejected[reason]:,} {reason}" for reason in sorted(rejected))
            raise DataError(
                f"{total:,} of {records:,} records are bad ({reasons}), more than the "
                f"{float(MAX_BAD_SHARE):.1%} that 'tolerant' leaves out"
            )

    def _report(self, position: int) -> None:
        if self.on_progress is not None:
            sizes = [source.size for source in self.sources]
            known = [size for size in sizes if size is not None]
            total = sum(known) if len(known) == len(sizes) else None
            done = self.progress
            self.on_progress(PrepareProgress(position, total, done.num_text_bytes, done.num_tokens))

    def _check_splits(self) -> None:
        """Refuse a split that was asked for and got nothing."""
        validates = self.config.val_sources or self.config.fraction
        for name in (TRAIN, VALIDATION) if validates else (TRAIN,):
            if not any(stream["num_tokens"] for stream in self._streams(name)):
                raise DataError(
                    f"split '{name}' got no text of {self.progress.num_records:,} records with "
                    f"val_fraction={float(self.config.fraction)}: change it, or give val_sources"
                )

    def _files(self) -> dict[str, Any]:
        paths = (self.output / TOKENIZER_FOLDER).iterdir()
        files = {f"{TOKENIZER_FOLDER}/{path.name}": describe_file(path) for path in paths}
        for stream in self.progress.streams.values():
            files |= stream.closed
        return files

    def _facts(self, rules: list[SplitRule]) -> dict[str, Any]:
        """What the manifest says besides the files."""
        weights = [*self.config.weights] or [1.0] * len(self.config.sources)
        weights += [1.0] * len(self.config.val_sources)
        progress = self.progress
        return {
            "kind": KIND,
            "dtype": token_dtype(self.tokenizer.vocab_size).name,
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "config": self.signature,
            "sources": [
                {"spec": source.spec, "weight": weight, "split": rule.to_dict()}
                for source, weight, rule in zip(self.sources, weights, rules, strict=True)
            ],
            "splits": {name: self._streams(name) for name in (TRAIN, VALIDATION)},
            "num_records": progress.num_records,
            "num_empty_documents": progress.num_empty,
            "rejected": progress.rejected,
        }

    def _streams(self, split: str) -> list[dict[str, Any]]:
        facts = []
        for number in range(len(self.sources)):
            state = self.progress.streams.get(_stem((split, number)))
            if state is not None:
                counts = ("num_tokens", "num_documents", "num_text_bytes")
                entry = {name: getattr(state, name) for name in counts}
                facts.append({"source": number, **entry, "shards": list(state.closed)})
        return facts


def _stem(stream: Stream) -> str:
    split, source = stream
    return f"{split}-{source:02d}"

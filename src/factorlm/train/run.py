"""A run's folder: whose it is, what it holds, and whether it may go on.

``runs/<name>/``: ``config.yaml`` (resolved), ``records.jsonl``, ``checkpoints/step-N/``, ``model/``
(the last weights) and ``model-best/`` (the best validation loss).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel
from transformers.utils import logging

from factorlm.distributed import World
from factorlm.errors import ConfigError, FactorlmError
from factorlm.records import RECORDS_FILE, EventRecord, RecordFile, StepRecord
from factorlm.storage import (
    atomic_folder,
    atomic_write_text,
    folder_lock,
    remove_leftovers,
)
from factorlm.train.checkpoint import (
    check_finite,
    load_checkpoint,
    newest_checkpoint,
    retain,
    save_checkpoint,
    write_on_main,
)
from factorlm.train.config import TrainConfig
from factorlm.train.recipe import read_mapping
from factorlm.train.state import RunState, full, model_tensors

MAY_CHANGE = (
    "labels",
    "eval.",
    "checkpoint.",
    "monitor.",
    "tracking.",
    "data.path",
    "data.source",
    "data.tokenizer",
    "parallel.strategy",
    "parallel.device",
    "parallel.num_threads",
    "parallel.timeout_seconds",
    "parallel.activation_checkpointing",
)
"""Fields that a resumed run may state otherwise: they do not change what is learned, beyond the
order of floating-point sums. (What ``data.path`` holds is compared by its fingerprint.)"""


class RunFolder:
    """``runs/<name>``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = RecordFile(path / RECORDS_FILE)

    @contextmanager
    def claimed(self, config: TrainConfig, world: World) -> Iterator[None]:
        """Hold the folder for ``config`` alone. Raises on every process what the main one meets:
        ``StorageError`` if another process has it, ``ConfigError`` if it holds another run."""
        lock = folder_lock(self.path, owner="factorlm train") if world.is_main else nullcontext()
        problem: FactorlmError | None = None
        try:
            lock.__enter__()
        except FactorlmError as error:
            problem, lock = error, nullcontext()
        try:
            if world.is_main and problem is None:
                try:
                    self._adopt(config)
                except FactorlmError as error:
                    problem = error
            problem = world.from_main(problem)
            if problem is not None:
                raise problem
            yield
        finally:
            lock.__exit__(None, None, None)

    def _adopt(self, config: TrainConfig) -> None:
        """Clear what a killed process left half-written; write the config of a new run, or compare
        it with that of an old one. A run is new until its first record: data or a model that
        could not be opened may be corrected."""
        checkpoints = self.path / "checkpoints"
        for folder in (self.path, checkpoints):
            remove_leftovers(folder)
        path = self.path / "config.yaml"
        values = config.to_dict()
        is_new = not self.records.path.exists() and not checkpoints.exists()
        if path.exists() and not is_new:
            saved = read_mapping(path, "config")
            if saved == values:
                return
            check_same_run(self.path, saved, values)
        atomic_write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def is_finished(self, world: World) -> bool:
        """Whether an earlier call finished the run."""
        finished = False
        if world.is_main and self.records.path.exists():
            finished = any(
                isinstance(record, EventRecord) and record.event == "finished"
                for record in self.records
            )
        return bool(world.from_main(finished))

    def losses(self, world: World, last: int) -> list[float]:
        """Of the ``last`` recorded steps, in order, on every process."""
        found: list[float] = []
        if world.is_main and self.records.path.exists():
            found = [record.loss for record in self.records if isinstance(record, StepRecord)]
        return list(world.from_main(found[-last:]))

    def newest_checkpoint(self, world: World) -> Path | None:
        """The newest good checkpoint; None where there is none."""
        return newest_checkpoint(self.path / "checkpoints", world)

    def load_checkpoint(
        self,
        path: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
        world: World,
    ) -> RunState:
        """Load the checkpoint ``path`` in place; where the run then is.

        ``facts["data"]`` must equal what was saved (``ConfigError``); a changed
        ``facts["environment"]`` is worth a warning, since bits may then differ.
        """
        state, saved = load_checkpoint(path, model, optimizer)
        if saved.get("data") != facts["data"]:
            raise ConfigError(
                f"data.path: the prepared data is not what {self.path} was trained on "
                f"(fingerprint {facts['data']}, was {saved.get('data')})"
            )
        old, new = saved.get("environment", {}), facts["environment"]
        changed = [f"{k} {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]
        if changed and world.is_main:
            warnings.warn(
                "resumed in another environment, so bits may differ: " + ", ".join(changed),
                stacklevel=2,
            )
        return state

    def save_checkpoint(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        facts: Mapping[str, Any],
        world: World,
        keep: int,
    ) -> None:
        """Save, then remove what is older than the ``keep`` newest."""
        folder = self.path / "checkpoints"
        save_checkpoint(folder, model, optimizer, state, facts, world)
        if world.is_main:
            retain(folder, keep, state.step)

    def save_model(
        self, name: str, model: PreTrainedModel, tokenizer: Path | None, world: World
    ) -> None:
        """Write ``name`` as a Hugging Face folder with its tokenizer, from whole tensors. Raises
        ``StorageError`` on every process if the main one cannot write."""
        tensors = {key: full(tensor) for key, tensor in model_tensors(model)}
        check_finite(tensors)

        def write() -> None:
            with atomic_folder(self.path / name, replace=True) as temporary:
                with _no_progress_bars():
                    model.save_pretrained(temporary, state_dict=tensors)
                if tokenizer is not None:
                    shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)

        write_on_main(self.path / name, write, world)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers draws one for every save, over our own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_same_run(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` naming every field that differs and may not, with both values."""
    old, new = flatten(saved), flatten(wanted)
    problems = [
        f"{key}={new.get(key)!r}, was {old.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if problems:
        raise ConfigError(
            f"{path} holds a run with another recipe: {'; '.join(problems)}. "
            "Give the new run another name, or remove that folder"
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

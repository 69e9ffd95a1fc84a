"""Checkpoints of a run: whole or absent, checked before they are used, never pickled.

``checkpoints/step-N/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and,
written last, ``manifest.json`` with sizes and checksums.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from factorlm.distributed import World
from factorlm.errors import CheckpointError, NumericError, StorageError
from factorlm.storage import (
    atomic_folder,
    remove_folder,
    require_free_space,
    verify,
    write_manifest,
)
from factorlm.train.state import (
    RunState,
    full,
    load_model_,
    load_optimizer_,
    model_tensors,
    optimizer_tensors,
)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_STEP = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    facts: Mapping[str, Any],
    world: World,
) -> None:
    """Write ``folder/step-N`` from whole tensors; every process has to call it.

    ``facts`` are plain values kept beside the state, such as what the data was. Raises
    ``StorageError`` on every process if the main one cannot write, and ``NumericError`` for a
    weight that is not finite; nothing is left then.
    """
    tensors = {
        MODEL_FILE: {name: full(tensor) for name, tensor in model_tensors(model)},
        OPTIMIZER_FILE: {name: full(tensor) for name, tensor in optimizer_tensors(optimizer)},
    }
    check_finite(tensors[MODEL_FILE])
    path = folder / f"step-{state.step}"
    write_on_main(path, lambda: _write(path, tensors, state, facts), world)


def write_on_main(path: Path, write: Callable[[], None], world: World) -> None:
    """Call ``write``, which writes ``path``, on the main process; its ``StorageError`` is raised on
    every process. Every process has to call this."""
    problem = None
    if world.is_main:
        try:
            write()
        except StorageError as error:
            problem = str(error)
        except SafetensorError as error:  # as the library calls a full disk
            problem = f"cannot write {path}: {error}"
    problem = world.from_main(problem)
    if problem is not None:
        raise StorageError(problem)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``NumericError`` naming the first weights that are not finite."""
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NumericError(f"not saved: weights that are not finite: {', '.join(bad[:8])}")


def _write(
    path: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: RunState,
    facts: Mapping[str, Any],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if _clear(path):
        return
    size = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    require_free_space(path.parent, size)
    with atomic_folder(path) as temporary:
        for name, part in tensors.items():
            save_file(dict(part), temporary / name)
        text = json.dumps({"state": state.to_dict(), "facts": dict(facts)}, indent=2)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        write_manifest(temporary, {"step": state.step})


def _clear(path: Path) -> bool:
    """Whether a good checkpoint of the same step is there, from an earlier process: its bytes would
    be equal. A damaged one is removed."""
    if not path.exists():
        return False
    try:
        verify(path, CheckpointError)
    except CheckpointError:
        remove_folder(path)
        return False
    return True


def newest_checkpoint(folder: Path, world: World) -> Path | None:
    """The newest checkpoint that is complete and undamaged; None where there is none at all.

    The main process decides for all. A damaged one is named in a warning and the next older one
    taken. Raises ``CheckpointError`` with every reason if there are checkpoints and none is good.
    """
    found: str | None = None
    problem: str | None = None
    if world.is_main:
        try:
            path = _newest(folder)
            found = path.name if path else None
        except CheckpointError as error:
            problem = str(error)
    found, problem = world.from_main((found, problem))
    if problem is not None:
        raise CheckpointError(problem)
    return folder / found if found else None


def _newest(folder: Path) -> Path | None:
    reasons = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path, CheckpointError)
            return path
        except CheckpointError as error:
            reasons.append(str(error))
            warnings.warn(f"checkpoint left out: {error}", stacklevel=2)
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} can be used: " + "; ".join(reasons))
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The folders ``step-N``, oldest first, whatever else lies there."""
    if not folder.is_dir():
        return []
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := _STEP.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return [steps[step] for step in sorted(steps)]


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, Any]]:
    """Load weights and optimizer state in place; the run's state and the saved facts.

    Raises ``CheckpointError`` naming the file and what does not fit.
    """
    try:
        load_model_(model, load_file(path / MODEL_FILE))
        load_optimizer_(optimizer, load_file(path / OPTIMIZER_FILE))
        values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        return RunState.from_dict(values["state"]), values["facts"]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def retain(folder: Path, keep: int, step: int) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``step``, which was saved just now.

    Those after it were damaged: the run went back to one before.
    """
    found = checkpoints(folder)
    good = [path for path in found if checkpoint_step(path) <= step]
    for path in found:
        if path not in good[-keep:]:
            remove_folder(path)

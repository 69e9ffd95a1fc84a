"""Open saved models: local folders first, safetensors only, and never a random weight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from factorlm.errors import CheckpointError
from factorlm.hf.auto import register

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
RUN_MODELS = ("model-best", "model")
"""The folders of a run that hold a model, the preferred one first."""

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load(
    model: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Open a causal LM, dense or structured, in eval mode.

    Args:
        model: a run's folder (its best model, else its last), a Hugging Face model folder, or,
            where no such folder exists, a Hub id.
        dtype: None keeps the one of the file.

    Raises ``CheckpointError`` if a weight is missing, unknown or of another shape, if a file is
    damaged or lies outside the folder, or if the weights are not in safetensors: nothing is ever
    filled with random values.
    """
    folder = model_folder(model)
    register()
    with errors_name(folder):
        _check_config(folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Sizes that differ are then listed, and refused below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _check_complete(info)
    opened: PreTrainedModel = loaded.to(device)
    return opened


def saved_config(model: str | os.PathLike[str]) -> PretrainedConfig:
    """The config of a run's, a saved or a Hub model. Raises ``CheckpointError``."""
    folder = model_folder(model, weights=False)
    with errors_name(folder):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return config


@contextmanager
def errors_name(folder: Path) -> Iterator[None]:
    """Whatever reading ``folder`` raises becomes a ``CheckpointError`` that names it.

    Files from elsewhere make transformers fail in many types; what this machine lacks is not
    their fault.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: {error}") from error


def model_folder(model: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local folder of a run's, a saved or a Hub model, its file names checked.

    With ``weights=False`` only ``config.json`` has to be there. Raises ``CheckpointError``.
    """
    path = Path(model)
    if not path.exists() and _looks_like_hub_id(os.fspath(model)):
        folder = _download(os.fspath(model))
        # The Hub's cache keeps files as links into its store, beside the snapshots.
        root = folder.parent.parent
    else:
        folder = root = _local_folder(path)
    check_files(folder, root.resolve(), weights=weights)
    return folder


def _local_folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    candidates = [path, *(path / name for name in RUN_MODELS)]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{path}: no config.json here nor in {' or '.join(RUN_MODELS)}: neither a saved model nor "
        "a run that has saved one"
    )


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        raise CheckpointError(
            f"{model_id}: no such folder, and not to be had from the Hub: {error}"
        ) from error


def check_files(folder: Path, root: Path, *, weights: bool = True) -> None:
    """Refuse a model folder whose files lie outside ``root``, or that has no safetensors.

    transformers follows the names of the shard index wherever they lead. Raises
    ``CheckpointError`` naming the file.
    """
    for path in folder.iterdir():
        if not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: links to {path.resolve()}, outside of {root}")
    if not weights or (folder / WEIGHTS_FILE).is_file():
        return
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}; {_other(folder)}"
        )
    for name in sorted(set(_weight_map(index).values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: '{name}' is not the plain name of a safetensors file")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: '{name}' is not in the folder")


def _check_config(folder: Path) -> None:
    """Refuse a model folder that sends transformers elsewhere: to a base model or for a kernel."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError("adapter_config.json: an adapter, not a model; merge it first")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in _fields(fields):
        if key.endswith("_implementation") and "/" in str(value):
            raise CheckpointError(f"config.json: {key}={value!r} would load code from the Hub")


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _fields(item)


def _other(folder: Path) -> str:
    pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    if not pickled:
        return "no weights"
    return f"'{sorted(pickled)[0]}' may run code when read: convert it to safetensors"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a shard index: {error!r}") from None
    plain = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not plain or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map weights to file names")
    return dict(weight_map)


def _check_complete(info: dict[str, Any]) -> None:
    """Refuse what ``from_pretrained`` only warns of."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}{more}")

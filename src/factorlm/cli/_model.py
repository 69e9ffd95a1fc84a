"""What the commands that open a model share: its argument, its device, the records of its run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factorlm.config import check
from factorlm.records import RECORDS_FILE, EvalRecord, Record, RecordFile, RunRecord, StepRecord

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``model``, ``--device`` and ``--dtype``."""
    parser.add_argument(
        "model",
        help="a run's folder (its best model, else its last), a Hugging Face model folder, or a "
        "Hub id",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and computation (default: as saved)"
    )


def open_model(args: argparse.Namespace) -> PreTrainedModel:
    """The model that ``add_model_arguments`` names, in eval mode."""
    import torch
    from transformers.utils import logging

    from factorlm.hf import load

    logging.disable_progress_bar()
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return load(args.model, device=find_device(args.device), dtype=dtype)


def find_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises ``ConfigError`` for one that is not there."""
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(count))]
    check(name in known and (name == "cpu" or count > 0), f"--device {name}: {_devices(count)}")
    return torch.device(name)


def _devices(count: int) -> str:
    return f"cpu or cuda, cuda:0 to cuda:{count - 1}" if count else "there is only cpu here"


@dataclass(frozen=True)
class RunOfModel:
    """The run whose folder the user named as the model."""

    record: RunRecord
    _file: RecordFile

    def append(self, record: Record) -> None:
        """Add what was measured to the run's records."""
        self._file.append(record)

    def trained(self, *, best: bool) -> tuple[int, int]:
        """(steps, tokens) that the run's best or last model was trained for."""
        records = list(self._file)
        of_training = (r for r in records if isinstance(r, EvalRecord) and r.source == "validation")
        evals = [record for record in of_training if not record.guided]  # as none is saved
        if best and evals:
            part = min(record.num_eval_tokens for record in evals)  # what best is chosen on
            equal = [record for record in evals if record.num_eval_tokens == part]
            lowest = min(equal, key=lambda record: record.loss)
            return lowest.step, lowest.num_tokens
        steps = [r for r in records if isinstance(r, StepRecord)]
        return (steps[-1].step, steps[-1].num_tokens) if steps else (0, 0)


def find_run(model: str) -> RunOfModel | None:
    """The run that ``model`` names; None if it names a model folder or an id."""
    file = RecordFile(Path(model) / RECORDS_FILE)
    if not file.path.is_file():
        return None
    found = (record for record in file if isinstance(record, RunRecord))
    record = next(found, None)
    return None if record is None else RunOfModel(record, file)

"""What a run is, in plain values: of its data, its machine and its model."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from factorlm.config import check
from factorlm.data import TokenDataset, open_dataset
from factorlm.distributed import World
from factorlm.errors import DataError
from factorlm.measure import environment
from factorlm.records import RunRecord
from factorlm.storage import MANIFEST_FILE
from factorlm.train.config import TrainConfig
from factorlm.train.describe import Description


def open_data(config: TrainConfig) -> TokenDataset:
    """The recipe's prepared data.

    Raises ``DataError`` with the command that makes it where it is not there, and ``ConfigError``
    where it does not fit the model.
    """
    data = config.data
    if not Path(data.path, MANIFEST_FILE).exists():
        command = ["factorlm", "prepare", *(data.source or ["SOURCE"]), "-o", data.path or "DIR"]
        command += ["--tokenizer", data.tokenizer] if data.tokenizer else []
        raise DataError(
            f"data.path={data.path!r} holds no prepared data; make it with: {shlex.join(command)}"
        )
    dataset = open_dataset(data.path)
    size = dataset.vocab_size
    check(
        config.model.vocab_size >= size or config.model.init_from is not None,
        f"model.vocab_size={config.model.vocab_size} is under the {size} tokens of "
        f"data.path={config.data.path}",
    )
    return dataset


def resume_facts(dataset: TokenDataset, world: World) -> dict[str, Any]:
    """What a resumed run is compared with: other data is refused, another machine told."""
    return {
        "data": data_fingerprint(dataset),
        "environment": {
            "torch": torch.__version__,
            "num_threads": torch.get_num_threads(),
            "device": world.device.type,
            "world_size": world.size,
        },
    }


def data_fingerprint(dataset: TokenDataset) -> str:
    """16 hexadecimal digits that change with any shard, weight or tokenizer."""
    shards = {name: entry.xxh3_128 for name, entry in dataset.manifest.files.items()}
    weights = [[s.weight for s in split.streams] for split in dataset.splits.values()]
    text = json.dumps([shards, weights, dataset.tokenizer_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_record(described: Description, world: World) -> RunRecord:
    """What the run is, as it was counted on the meta device."""
    config, plan = described.config, described.plan
    return RunRecord(
        name=config.name,
        config=config.to_dict(),
        environment=environment(world.device) | {"world_size": world.size},
        num_params=described.params.total,
        num_ffn_params=described.params.ffn,
        num_non_embedding_params=described.params.non_embedding,
        forward_flops_per_token=described.forward.total,
        training_flops=described.training.model_flops,
        executed_flops=described.training.executed_flops,
        num_steps=plan.num_steps,
        num_original_steps=plan.num_original_steps,
        num_guide_steps=0 if plan.guide is None else plan.guide.num_steps,
        tokens_per_step=config.tokens_per_step,
    )

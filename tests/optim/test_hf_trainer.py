"""The optimizers in Hugging Face's Trainer, which wraps, schedules, saves and resumes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from factorlm.layers import LowRankConfig
from factorlm.optim import build_optimizer
from factorlm.surgery import factorize_
from factorlm.testing.models import tiny_input_ids, tiny_model


def train(folder: Path, kind: str, resume: str | None = None) -> dict[str, Tensor]:
    """Six steps; a checkpoint after three."""
    model = tiny_model("llama").train()
    factorize_(model, LowRankConfig(rank=8))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2,
        lr_scheduler_type="linear", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in tiny_input_ids(batch=12)]
    optimizer = build_optimizer(model, kind=kind, learning_rate=1e-2)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["muon", "spectron"])
def test_a_resumed_training_ends_in_the_same_weights(tmp_path: Path, kind: str) -> None:
    wanted = train(tmp_path / "whole", kind)
    found = train(tmp_path / "whole", kind, str(tmp_path / "whole" / "checkpoint-3"))
    initial = tiny_model("llama").get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(wanted["model.layers.0.mlp.up_proj.weight"], initial)
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name

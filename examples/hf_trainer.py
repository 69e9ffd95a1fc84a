"""Train a structured model with the Hugging Face ``Trainer``; reopen what it saved.

The ``Trainer`` needs ``pip install accelerate``. The model and the text (Python's own ``argparse``
as bytes) are small and local:

    python examples/hf_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from factorlm import BlockShuffleConfig, build_causal_lm

CONTEXT_LENGTH = 64


def read_blocks() -> list[dict[str, torch.Tensor]]:
    """The text as rows of bytes, in the form that the ``Trainer`` takes."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    blocks = tokens[: len(tokens) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def train(model: PreTrainedModel, folder: str) -> Trainer:
    """Twenty steps, saved into ``folder``."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=5,
        save_steps=20,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=read_blocks())
    trainer.train()
    return trainer


def main() -> None:
    """Train, reopen the checkpoint with plain transformers, and compare the logits."""
    model = build_causal_lm("gpt_nano", BlockShuffleConfig(num_blocks=4), vocab_size=256)
    with tempfile.TemporaryDirectory() as folder:
        train(model, folder)
        # `import factorlm` is all that from_pretrained needs to know structured layers.
        reopened = AutoModelForCausalLM.from_pretrained(f"{folder}/checkpoint-20").eval()
    prompt = torch.tensor([list(b"def main(")])
    with torch.no_grad():
        same = torch.equal(reopened(prompt).logits, model.eval()(prompt).logits)
    print(f"reopened: {type(reopened).__name__}, logits equal: {same}")
    assert same


if __name__ == "__main__":
    main()

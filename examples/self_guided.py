"""Self-guided training with the Hugging Face ``Trainer``, cut in two and resumed.

Each structured layer trains beside a dense weight, its guide, whose share falls to nothing over the
first half of the steps; what is left is an ordinary structured model. The run is cut while the
guides are there. The ``Trainer`` needs ``pip install accelerate``; the text is small and local:

    python examples/self_guided.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import factorlm
from factorlm import BlockShuffleConfig, SelfGuidedTraining, build_causal_lm

CONTEXT_LENGTH = 64
NUM_STEPS = 20


class Interrupt(TrainerCallback):
    """Ends the training after ``step``, which is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **others) -> None:
        """Save and stop."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def read_blocks() -> list[dict[str, torch.Tensor]]:
    """The text as rows of bytes, in the form that the ``Trainer`` takes."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    blocks = tokens[: len(tokens) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def make_trainer(folder: str, *callbacks: TrainerCallback) -> Trainer:
    """A new model and what trains it; the callback attaches the guides."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=5,
        save_steps=NUM_STEPS,
        report_to="none",
        use_cpu=True,
    )
    return Trainer(
        model=build_causal_lm("gpt_nano", BlockShuffleConfig(num_blocks=4), vocab_size=256),
        args=arguments,
        train_dataset=read_blocks(),
        callbacks=[SelfGuidedTraining(share=0.5), *callbacks],
    )


def main() -> None:
    """Train at once, and cut in two; compare the weights that come out, and open the model."""
    with tempfile.TemporaryDirectory() as folder:
        whole = make_trainer(f"{folder}/whole")
        whole.train()
        make_trainer(f"{folder}/cut", Interrupt(7)).train()
        resumed = make_trainer(f"{folder}/cut")
        resumed.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-7")
        opened = factorlm.load(f"{folder}/cut/checkpoint-{NUM_STEPS}")
    weights = opened.state_dict()
    same = all(
        torch.equal(weights[name], weight) for name, weight in whole.model.state_dict().items()
    )
    print(f"opened: {type(opened).__name__}, equal to the run that was not cut: {same}")
    assert same


if __name__ == "__main__":
    main()

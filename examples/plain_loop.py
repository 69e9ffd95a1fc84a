"""Structure the FFN of a stock Hugging Face model, then train it in a loop of your own.

The model is a small Llama with random weights, the text is Python's own ``argparse`` as bytes, so
the script needs no download and takes seconds on a CPU:

    python examples/plain_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from factorlm import LowRankConfig, count_params, factorize_

NUM_STEPS = 40
BATCH_SIZE = 8
CONTEXT_LENGTH = 64


def build_model() -> LlamaForCausalLM:
    """A Llama over bytes whose FFN linears, but those of the first layer, are low-rank."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    print(f"dense: {count_params(model).total:,} parameters")
    # "reset" draws new factors. "project", the default, approximates the weights that are there.
    report = factorize_(model, LowRankConfig(), param_ratio=0.32, weights="reset")
    print(report)
    print(f"structured: {count_params(model).total:,} parameters")
    return model


def train(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[float]:
    """A plain loop: structured layers are ``nn.Module``s with ordinary parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(NUM_STEPS):
        starts = torch.randint(len(tokens) - CONTEXT_LENGTH, (BATCH_SIZE,))
        batch = torch.stack([tokens[start : start + CONTEXT_LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == NUM_STEPS - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    return losses


def main() -> list[float]:
    """Build, train, and give the loss of every step in nats per byte."""
    torch.manual_seed(0)
    text = Path(argparse.__file__).read_bytes()
    return train(build_model(), torch.tensor(list(text)))


if __name__ == "__main__":
    main()

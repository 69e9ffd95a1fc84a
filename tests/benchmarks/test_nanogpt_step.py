"""The comparison with nanoGPT, by a stand-in of its interface: models that differ are not timed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.test_quality import load_script

from factorlm.bench.model import ModelShape
from factorlm.errors import ConfigError, NumericError

STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        heads = self.c_attn(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(config)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd),
        })

    def forward(self, idx, targets):
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        logits = F.linear(self.transformer["ln_f"](x), self.transformer["wte"].weight)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_script("nanogpt_step")
    shape = ModelShape(width=64, num_layers=2, vocab_size=96, context_length=24)
    monkeypatch.setattr(module, "SHAPE", shape)
    return module


def arguments(folder: Path, text: str) -> argparse.Namespace:
    (folder / "model.py").write_text(text, encoding="utf-8")
    return argparse.Namespace(nanogpt=folder, rows=2, rounds=2)


def test_models_that_agree_are_timed(script: Any, tmp_path: Path) -> None:
    record = script.measure(arguments(tmp_path, STAND_IN))
    assert {"nanoGPT fp32", "factorlm fp32"} <= set(record.cases)
    assert record.bars[0]["name"] == "factorlm fp32 / nanoGPT fp32"
    assert record.settings["num_tokens"] == 48


def test_equal_weights_agree_in_every_precision(script: Any, tmp_path: Path) -> None:
    arguments(tmp_path, STAND_IN)
    theirs = script.build_nanogpt(tmp_path)
    script.check_same(theirs, script.twin_of(theirs), ["fp32", "bf16"])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("is_causal=True", ""), ("F.gelu(", "F.relu("), ("x + self.attn", "x - self.attn")],
)
def test_a_model_that_computes_something_else_is_not_timed(
    script: Any, tmp_path: Path, right: str, wrong: str
) -> None:
    assert right in STAND_IN
    with pytest.raises(NumericError, match=r"(loss|gradient) in fp32 is off by .*: nothing was"):
        script.measure(arguments(tmp_path, STAND_IN.replace(right, wrong)))


def test_a_wrong_gradient_of_ours_is_not_timed(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = script.loss_backward

    def wrong(model: Any, *batch: Any) -> Any:
        loss = right(model, *batch)
        model.get_parameter("model.layers.1.mlp.c_fc.weight").grad.mul_(1.01)
        return loss

    monkeypatch.setattr(script, "loss_backward", wrong)
    with pytest.raises(NumericError, match="gradient in fp32 is off by"):
        script.measure(arguments(tmp_path, STAND_IN))


def test_parameters_of_one_model_alone_are_named(script: Any, tmp_path: Path) -> None:
    arguments(tmp_path, STAND_IN)
    theirs = script.build_nanogpt(tmp_path)
    script.NAMES = {name: place for name, place in script.NAMES.items() if name != "mlp.c_fc"}
    with pytest.raises(ConfigError, match=r"only one of the models has: .*mlp\.c_fc\.bias"):
        script.twin_of(theirs)


def test_a_folder_without_nanogpt_is_named(script: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--nanogpt .*: no clone of nanoGPT"):
        script.build_nanogpt(tmp_path)

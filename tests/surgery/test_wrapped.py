"""Surgery on a module that holds a Hugging Face model does for that what it does for it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factorlm.errors import ConfigError
from factorlm.hf import load
from factorlm.layers import LowRankConfig
from factorlm.surgery import attach_guides_, densify_, detach_guides_, factorize_
from factorlm.testing.models import tiny_input_ids, tiny_model


class Scored(nn.Module):
    """A user's module around a language model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.score = nn.Linear(32, 1)


def test_the_model_inside_is_saved_as_a_structured_one(tmp_path: Path) -> None:
    inner = tiny_model("llama").eval()
    factorize_(Scored(inner), LowRankConfig(rank=4))
    inner.save_pretrained(tmp_path / "structured")
    with torch.no_grad():
        wanted = inner(tiny_input_ids()).logits
        assert torch.equal(load(tmp_path / "structured")(tiny_input_ids()).logits, wanted)


def test_a_compiled_model_is_written_down_without_the_wrapper() -> None:
    inner = tiny_model("llama")
    factorize_(torch.compile(inner), LowRankConfig(rank=4))
    assert "model.layers.1.mlp.up_proj" in inner.config.quantization_config["targets"]


def test_densify_gives_the_familys_own_modules_and_a_stock_config() -> None:
    inner = tiny_model("gpt2")
    factorize_(Scored(inner), LowRankConfig(rank=4))
    densify_(Scored(inner))
    assert type(inner.transformer.h[1].mlp.c_fc) is Conv1D
    assert "quantization_config" not in inner.config.to_dict()


def test_reset_draws_with_the_deviation_of_the_model_inside() -> None:
    inner = tiny_model("llama", hidden_size=256, initializer_range=0.5)
    factorize_(Scored(inner), LowRankConfig(rank=80), weights="reset")
    std = float(inner.model.layers[1].mlp.up_proj.weight.std())
    assert std == pytest.approx(0.5, rel=0.05)


def test_quantized_weights_inside_are_refused() -> None:
    inner = tiny_model("llama")
    inner.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigError, match="quant_method='gptq'"):
        factorize_(Scored(inner), LowRankConfig(rank=2))


def test_a_guided_model_inside_is_not_saved(tmp_path: Path) -> None:
    inner = tiny_model("llama")
    whole = Scored(inner)
    factorize_(whole, LowRankConfig(rank=4))
    attach_guides_(whole)
    with pytest.raises(ConfigError, match="has guides attached"):
        inner.save_pretrained(tmp_path)
    detach_guides_(whole)
    inner.save_pretrained(tmp_path)

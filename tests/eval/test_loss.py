from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from factorlm.data import EvalBatch
from factorlm.errors import DataError
from factorlm.eval import evaluate_loss
from factorlm.eval.loss import perplexity
from factorlm.hf.loss import CausalLMLoss
from factorlm.testing.models import VOCAB_SIZE, tiny_model


def batches(*lengths: int, context_length: int = 8) -> list[EvalBatch]:
    """A batch of random ids for each length, two rows each, padded to ``context_length``."""
    generator = np.random.default_rng(0)
    found = []
    for length in lengths:
        inputs = np.full((2, context_length), 2, dtype=np.int64)
        targets = np.full((2, context_length), -100, dtype=np.int64)
        inputs[:, :length] = generator.integers(3, VOCAB_SIZE, (2, length))
        targets[:, :length] = generator.integers(3, VOCAB_SIZE, (2, length))
        found.append(EvalBatch(inputs, targets))
    return found


def test_mean_over_all_predicted_tokens_of_unequal_batches() -> None:
    model = tiny_model("starcoder2").double()
    found = batches(8, 8, 3)
    result = evaluate_loss(CausalLMLoss(model), found, bytes_per_token=3.5)
    losses = []
    for batch in found:
        logits = model(input_ids=torch.from_numpy(batch.inputs)).logits
        for row, targets in zip(logits, torch.from_numpy(batch.targets), strict=True):
            real = targets != -100
            losses.append(functional.cross_entropy(row[real], targets[real], reduction="none"))
    expected = torch.cat(losses)
    assert result.num_tokens == len(expected) == 38
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(math.log2(math.e) * result.loss / 3.5)


def test_no_gradient_is_kept_and_progress_is_told() -> None:
    told: list[int] = []

    def loss_fn(inputs: Tensor, labels: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return inputs.sum().float()

    evaluate_loss(loss_fn, batches(8, 5), on_progress=told.append)
    assert told == [16, 26]


def test_sums_are_added_over_processes() -> None:
    model = tiny_model("llama").double()
    whole = evaluate_loss(CausalLMLoss(model), batches(8, 3, 5))
    sums: list[Tensor] = []

    def collect(values: Tensor) -> Tensor:
        sums.append(values)
        return torch.stack(sums).sum(0)

    parts = batches(8, 3, 5)
    evaluate_loss(CausalLMLoss(model), parts[::2], add_up=collect)
    result = evaluate_loss(CausalLMLoss(model), parts[1::2], add_up=collect)
    assert result.num_tokens == whole.num_tokens
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)


def test_bytes_that_are_not_known() -> None:
    result = evaluate_loss(lambda inputs, labels: torch.tensor(1.0), batches(4))
    assert result.bits_per_byte is None


def test_refuses_nothing_to_predict() -> None:
    with pytest.raises(DataError, match="no token to predict"):
        evaluate_loss(lambda inputs, labels: torch.tensor(0.0), batches(0))
    with pytest.raises(DataError, match="no token to predict"):
        evaluate_loss(lambda inputs, labels: torch.tensor(0.0), [])


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(math.log(7.0)) == pytest.approx(7.0)
    assert perplexity(1e6) == math.inf

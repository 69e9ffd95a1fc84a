"""What the times of a generation count, on a clock that only the test moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from factorlm.inference import Sampling, decoder, generate_tokens
from factorlm.testing.models import tiny_model

GREEDY = Sampling(greedy=True)
PROMPTS = [[5, 6, 7], [8]]


class Clock:
    """Stands still but for ``seconds`` that are added."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(decoder, "time", made)
    return made


@pytest.fixture
def model(clock: Clock) -> PreTrainedModel:
    """A second for each of its tokens."""

    def work(module: nn.Module, args: object, given: dict[str, torch.Tensor]) -> None:
        clock.seconds += given["input_ids"].shape[1]

    made = tiny_model("llama")
    made.register_forward_pre_hook(work, with_kwargs=True)
    return made


def test_what_is_done_with_a_token_counts_nowhere(model: PreTrainedModel, clock: Clock) -> None:
    def on_token(row: int, token: int) -> bool:
        clock.seconds += 100
        return False

    found = generate_tokens(model, PROMPTS, max_new_tokens=5, sampling=GREEDY, on_token=on_token)
    assert found.prefill_seconds == 3
    assert found.decode_ms == (1000,) * 4
    assert clock.seconds >= 1000

"""What the times of a generation count, on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorlm.inference import Decoder, Sampling, decoder, generate_tokens, graph
from factorlm.inference.cache import StaticKVLayer
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

    def work(module: nn.Module, args: object, given: dict[str, Tensor]) -> None:
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


def slow_once(clock: Clock, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``step``, whose first call takes an hour."""
    left = [3600]

    def run() -> Tensor:
        clock.seconds += left.pop() if left else 0
        return step()

    return run


@pytest.mark.parametrize("way", ["plain", "captured", "compiled"])
def test_a_first_call_takes_as_long_as_later_ones(
    model: PreTrainedModel, clock: Clock, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What it makes for all of them is no part of it, and neither is what a longer one makes."""

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        slow_once(clock, step)()
        return step

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "compile_frozen", lambda steps: slow_once(clock, steps._step))
    monkeypatch.setattr(decoder, "can_capture", lambda *given: way == "captured")
    made = Decoder(model, compiled=way == "compiled")
    for count in (4, 4, 9):
        found = made.generate(PROMPTS, max_new_tokens=count, sampling=GREEDY)
        assert found.prefill_seconds == 3
        assert found.decode_ms == (1000,) * (count - 1)
    assert (clock.seconds > 2 * 3600) is (way != "plain")


def test_memory_is_there_before_the_clock_starts(
    model: PreTrainedModel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = StaticKVLayer.lazy_initialization

    def slow(self: StaticKVLayer, keys: Tensor, values: Tensor) -> None:
        clock.seconds += 3600
        allocate(self, keys, values)

    monkeypatch.setattr(StaticKVLayer, "lazy_initialization", slow)
    found = generate_tokens(model, PROMPTS, max_new_tokens=2, sampling=GREEDY)
    assert found.prefill_seconds == 3
    assert clock.seconds > 3600

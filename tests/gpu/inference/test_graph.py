"""The decode step as a CUDA graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from factorlm import LowRankConfig, factorize_
from factorlm.inference import Decoder, Sampling
from factorlm.inference.capture import capture
from factorlm.inference.graph import GraphSteps
from factorlm.testing.models import tiny_model

GREEDY = Sampling(greedy=True)
PROMPTS = [list(range(5, 12)), [7, 8, 9], [90, 3, 55, 20, 11]]


@pytest.mark.parametrize("family", ["llama", "starcoder2", "gpt2", "qwen3", "gemma2"])
def test_graph_gives_the_tokens_of_plain_steps(family: str) -> None:
    """Padded and not, and again with the same graph."""
    model = tiny_model(family, initializer_range=0.3)
    factorize_(model, LowRankConfig(rank=6))
    model.cuda()
    decoder, plain = Decoder(model, max_length=40), Decoder(model, cuda_graph=False)
    for prompts in (PROMPTS, [PROMPTS[0]] * 3, PROMPTS[::-1]):
        found, expected = (
            one.generate(prompts, max_new_tokens=20, sampling=GREEDY).ids
            for one in (decoder, plain)
        )
        assert torch.equal(found, expected)
    (steps,) = decoder._kept.values()
    assert isinstance(steps, GraphSteps)


def test_samples_are_the_seeds_and_leave_the_global_state_alone() -> None:
    decoder = Decoder(tiny_model("llama").cuda(), max_length=40)
    decoder.generate(PROMPTS, max_new_tokens=2)
    before = torch.cuda.get_rng_state()
    first, again, other = (
        decoder.generate(PROMPTS, max_new_tokens=9, sampling=Sampling(seed=seed)).ids
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_what_a_graph_reads_stays_as_long_as_its_replay() -> None:
    x = torch.randn(3, 64, device="cuda")
    weight = torch.randn(64, 64, device="cuda")
    expected = x @ weight
    replay = capture(partial(torch.matmul, x, weight))
    del weight
    others = [torch.full((64, 64), torch.nan, device="cuda") for _ in range(8)]
    assert torch.equal(replay(), expected)
    assert all(other.isnan().all() for other in others)

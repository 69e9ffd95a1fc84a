"""Every structure in a decode graph, and bfloat16 against the model's own forward."""

from __future__ import annotations

import pytest
import torch
from tests.inference.test_steps import (
    LENGTH,
    NUM_STEPS,
    PADS,
    STRUCTURES,
    assert_bfloat16_near,
    bfloat16_model,
    logits_of_forward,
    logits_of_steps,
)

from factorlm import factorize_
from factorlm.inference import Decoder, Sampling
from factorlm.inference.graph import GraphSteps
from factorlm.testing.models import tiny_input_ids, tiny_model

GREEDY = Sampling(greedy=True)
PROMPTS = [[5, 6, 7, 8], [9, 3], [11, 40, 2]]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_a_graph_gives_the_tokens_of_plain_steps(family: str, structure: str) -> None:
    model = tiny_model(family, initializer_range=0.3)
    factorize_(model, STRUCTURES[structure])
    model.cuda()
    decoder, plain = Decoder(model, max_length=40), Decoder(model, cuda_graph=False)
    found, expected = (
        one.generate(PROMPTS, max_new_tokens=20, sampling=GREEDY).ids for one in (decoder, plain)
    )
    assert torch.equal(found, expected)
    (steps,) = decoder._kept.values()
    assert isinstance(steps, GraphSteps)


@pytest.mark.parametrize("num_pads", PADS, ids=["full", "padded"])
@pytest.mark.parametrize("structure", ["dense", *STRUCTURES])
@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_bfloat16_logits_of_a_graph_are_near_those_of_a_forward(
    family: str, structure: str, num_pads: torch.Tensor | None
) -> None:
    """The tokens that a greedy decode takes, forced on the model's own forward."""
    model = bfloat16_model(family, structure).cuda()
    ids = tiny_input_ids(batch=3, length=LENGTH + NUM_STEPS).cuda()
    pads = None if num_pads is None else num_pads.cuda()
    with torch.no_grad():
        steps = GraphSteps(model, 3, LENGTH + NUM_STEPS)
        logits = steps.prefill(ids[:, :LENGTH], pads)
        for place in range(LENGTH, ids.shape[1]):
            ids[:, place] = logits.argmax(dim=-1)
            logits = steps.step(ids[:, place])
    found = logits_of_steps(steps, ids, pads)
    assert_bfloat16_near(found, logits_of_forward(model, ids, pads))

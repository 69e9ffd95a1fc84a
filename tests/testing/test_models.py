"""The tiny models that other tests stand on."""

from __future__ import annotations

import pytest
import torch

from factorlm.testing.models import TINY_CONFIGS, VOCAB_SIZE, tiny_input_ids, tiny_model


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_each_is_tiny_of_its_family_and_reproducible(family: str) -> None:
    model, again = tiny_model(family), tiny_model(family)
    assert model.config.model_type == family
    assert model.config.num_hidden_layers in (2, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) < 120_000
    ids = tiny_input_ids()
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again(ids).logits, logits)
    assert logits.shape == (*ids.shape, VOCAB_SIZE)
    assert logits.isfinite().all()


def test_fields_and_seed_change_the_model() -> None:
    assert tiny_model("llama", num_hidden_layers=5).config.num_hidden_layers == 5
    first, second = (tiny_model("llama", seed=seed).lm_head.weight for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(tiny_input_ids(), tiny_input_ids(seed=1))

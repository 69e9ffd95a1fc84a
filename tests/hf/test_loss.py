"""The chunked loss of a whole model against the model's own forward, for every family."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from factorlm.hf.loss import CausalLMLoss, head_transform
from factorlm.testing.models import TINY_CONFIGS, VOCAB_SIZE, tiny_model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (2, 18), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    return ids[:, :-1], labels


def loud_model(family: str) -> torch.nn.Module:
    """Weights large enough that a cap or scale on the logits shows in the loss."""
    model = tiny_model(family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_loss_and_gradients_equal_the_models_own(family: str) -> None:
    model = loud_model(family)
    loss = CausalLMLoss(model, chunk_elements=VOCAB_SIZE * 5)
    inputs, labels = batch()
    found = loss(inputs, labels)
    logits = model(input_ids=inputs, use_cache=False).logits
    wanted = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    )
    grads = [(a, b) for a, b in pairs if b is not None]
    difference = torch.stack([(a - b).norm() for a, b in grads]).norm()
    assert difference < 1e-4 * torch.stack([b.norm() for _, b in grads]).norm()


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "gpt_neox",
        "opt",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "phi3",
        "starcoder2",
        "olmo2",
        "cohere",
        "granite",
    ],
)
def test_the_named_families_run_in_chunks(family: str) -> None:
    assert CausalLMLoss(tiny_model(family)).chunked


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_head_that_caps_or_scales_without_saying_so_runs_as_it_is(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loud_model(family)
    assert head_transform(model.config) != (1.0, None)
    monkeypatch.setattr("factorlm.hf.loss.head_transform", lambda config: (1.0, None))
    loss = CausalLMLoss(model)
    assert not loss.chunked
    inputs, labels = batch()
    logits = model(input_ids=inputs, use_cache=False).logits
    wanted = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss(inputs, labels), wanted)


def test_trying_the_head_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = dict(model.named_modules())
    CausalLMLoss(model)
    assert dict(model.named_modules()) == before

"""Attention of one token in half precision, against SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from factorlm.inference import Decoder, Sampling, attention


def inputs(dtype: torch.dtype, batch: int = 3, heads: int = 8, groups: int = 2, queries: int = 1):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    keys = draw(batch, groups, 40, 16)[:, :, :21]  # a view of a longer cache
    values = draw(batch, groups, 40, 16)[:, :, :21]
    return draw(batch, queries, heads, 16).transpose(1, 2), keys, values


def module(heads: int = 8, groups: int = 2) -> nn.Module:
    found = nn.Module()
    found.num_key_value_groups = heads // groups
    found.is_causal = True
    return found


def padding(rows: tuple[int, ...] = (0, 3, 20)) -> torch.Tensor:
    return torch.arange(21) >= torch.tensor(rows).view(-1, 1, 1, 1)


MASKS = {
    "none": None,
    "bool": padding(),
    "float": torch.zeros(3, 1, 1, 21).masked_fill(~padding(), torch.finfo(torch.bfloat16).min),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("scaling", [None, 0.7])
@torch.no_grad()
def test_one_query_equals_sdpa(mask: str, groups: int, scaling: float | None) -> None:
    """In float64 exactly; in bf16 as near to float64's as SDPA is, give or take a rounding."""
    given = MASKS[mask]
    for dtype, slack in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        query, key, value = inputs(dtype, groups=groups)
        cast = given if given is None or given.dtype == torch.bool else given.to(dtype)
        ours = attention.attend_one(query, key, value, cast, scaling)
        theirs, _ = sdpa_attention_forward(
            module(groups=groups), query, key, value, cast, scaling=scaling
        )
        assert ours.shape == theirs.shape == (3, 1, 8, 16)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=slack)


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"queries": 2}, False),
        ({"mask": torch.ones(3, 8, 1, 21, dtype=torch.bool)}, False),
        ({"dropout": 0.1}, False),
        ({"position_bias": torch.zeros(1)}, False),
        ({"most": 100}, False),
        ({"fewest": 10**6}, False),
        ({"grad": True}, False),
    ],
)
def test_the_rest_is_left_to_sdpa(
    change: dict[str, Any], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(attention, "FEWEST_PRODUCTS", change.get("fewest", 1))
    monkeypatch.setattr(attention, "MOST_VALUES", change.get("most", 2**23))
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *_, **given: calls.append(given) or (None, None)
    )
    query, key, value = inputs(
        change.get("dtype", torch.bfloat16), queries=change.get("queries", 1)
    )
    more = {name: change[name] for name in ("dropout", "position_bias") if name in change}
    with torch.set_grad_enabled(change.get("grad", False)):
        attention.attend(module(), query, key, value, change.get("mask"), scaling=0.5, **more)
    assert calls == ([] if served else [{"scaling": 0.5, **more}])


def llama(**changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_decoder_on_a_cpu_uses_it_and_agrees_with_sdpa_to_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits of steps of a padded batch, with this attention and with SDPA."""
    monkeypatch.setattr(attention, "FEWEST_PRODUCTS", 1)
    found = []
    for use in (True, False):
        model = llama().to(torch.bfloat16)
        decoder = Decoder(model)
        assert model.config._attn_implementation == "factorlm_sdpa"
        if not use:
            model.set_attn_implementation("sdpa")
        steps = decoder._make_steps(2, 12)
        with torch.no_grad():
            logits = [
                steps.prefill(torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([2, 0]))
            ]
            logits += [steps.step(torch.tensor([token, token + 1])).clone() for token in range(8)]
        found.append(torch.stack(logits).float())
    assert not torch.equal(*found)  # else it was not used
    torch.testing.assert_close(*found, rtol=0, atol=0.02 * float(found[0].abs().max()))


def test_other_implementations_stay() -> None:
    model = llama(attn_implementation="eager")
    Decoder(model)
    assert model.config._attn_implementation == "eager"


def test_it_is_not_saved_with_the_model(tmp_path) -> None:
    model = llama()
    before = Decoder(model).generate([[1, 2]], max_new_tokens=4, sampling=Sampling(greedy=True)).ids
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    after = again.generate(
        torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(after[:, 2:], before)


def test_training_after_generation_is_that_of_sdpa() -> None:
    """Prefill, gradients and a new model of the same class know nothing of it."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(6).unsqueeze(0)
    grads = []
    for generate in (False, True):
        if generate:
            Decoder(model).generate([[1]], max_new_tokens=2)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)

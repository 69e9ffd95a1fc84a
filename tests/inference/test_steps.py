"""Logits of steps against the whole sequence in one forward without cache."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import factorlm.inference.attention as attention
import factorlm.inference.packing as packing
from factorlm import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, factorize_, pack_
from factorlm.anatomy import anatomy_of
from factorlm.inference.attention import NAME, use_decode_attention
from factorlm.inference.cache import StaticKVCache
from factorlm.inference.graph import GraphSteps
from factorlm.inference.steps import (
    CachedSteps,
    SeparateSteps,
    Steps,
    WholeSteps,
    plain_steps,
)
from factorlm.ops.packed import can_pack
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids, tiny_model

LENGTH, NUM_STEPS = 9, 8
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLOSING = {"sliding_window": 4}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": CLOSING,
    "gemma2": CLOSING | {"head_dim": 8},
    "cohere2": CLOSING | {"layer_types": ALTERNATING},
    "llama4_text": {
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "mamba": {"state_size": 4},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 64},
    "rwkv": {"attention_hidden_size": 32},
}
"""Windows that close, chunks, recurrent states, and models that take no cache of today's kind."""


def special_model(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**(SIZES | SPECIAL[family]))
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits_of_steps(steps: Steps, ids: Tensor, num_pads: Tensor | None) -> Tensor:
    """(B, steps, V) with the tokens of ``ids`` forced."""
    found = [steps.prefill(ids[:, :LENGTH], num_pads).clone()]
    for place in range(LENGTH, ids.shape[1]):
        found.append(steps.step(ids[:, place]).clone())
    return torch.stack(found, dim=1)


@torch.no_grad()
def logits_of_forward(model: PreTrainedModel, ids: Tensor, num_pads: Tensor | None) -> Tensor:
    """The same of each row alone, without padding or cache."""
    pads = [0] * len(ids) if num_pads is None else num_pads.tolist()
    rows = [
        model(input_ids=row[count:][None], use_cache=False)
        for row, count in zip(ids, pads, strict=True)
    ]
    return torch.cat([row.logits[:, -NUM_STEPS - 1 :] for row in rows])


PADS = [None, torch.tensor([0, 3, 6])]


@pytest.mark.parametrize("num_pads", PADS, ids=["full", "padded"])
@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_steps_are_the_forward_of_the_prefix(family: str, num_pads: Tensor | None) -> None:
    model = tiny_model(family, initializer_range=0.1)
    if anatomy_of(model).ffn_linears:
        factorize_(model, LowRankConfig(rank=6))
    ids = tiny_input_ids(batch=3, length=LENGTH + NUM_STEPS)
    found = logits_of_steps(plain_steps(model, LENGTH + NUM_STEPS), ids, num_pads)
    torch.testing.assert_close(found, logits_of_forward(model, ids, num_pads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_pads", PADS, ids=["full", "padded"])
@pytest.mark.parametrize("family", sorted(SPECIAL))
def test_special_caches_are_right(family: str, num_pads: Tensor | None) -> None:
    model = special_model(family)
    ids = tiny_input_ids(batch=3, length=LENGTH + NUM_STEPS)
    steps = plain_steps(model, LENGTH + NUM_STEPS)
    for _ in range(2):  # what an earlier batch left behind does not matter
        found = logits_of_steps(steps, ids, num_pads)
        torch.testing.assert_close(
            found, logits_of_forward(model, ids, num_pads), rtol=1e-4, atol=1e-4
        )


def way(model: PreTrainedModel) -> str:
    steps = plain_steps(model, 20)
    if isinstance(steps, SeparateSteps):
        steps = steps._together
    if isinstance(steps, WholeSteps):
        return "whole"
    assert isinstance(steps, CachedSteps)
    return type(steps._cache).__name__


def test_which_way_a_model_goes() -> None:
    static = dict.fromkeys(("mistral", "gemma2", "cohere2", "llama4_text"), "StaticKVCache")
    hugging_face = dict.fromkeys(("lfm2", "recurrent_gemma"), "DynamicCache")
    whole = dict.fromkeys(("mamba", "ctrl", "rwkv"), "whole")
    found = {family: way(special_model(family)) for family in SPECIAL}
    assert found == static | hugging_face | whole
    assert {way(tiny_model(family)) for family in TINY_CONFIGS} == {"StaticKVCache"}


STRUCTURES = {
    "low_rank": LowRankConfig(rank=6),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=6),
}
BF16_PERCENT = 2
"""Of the largest logit: bfloat16 keeps 8 bits, and kernels sum in other orders. Another token far
back changes logits by 4 % and more."""


def bfloat16_model(family: str, structure: str) -> PreTrainedModel:
    model = tiny_model(family, initializer_range=0.1)
    if structure != "dense":
        factorize_(model, STRUCTURES[structure])
    return model.bfloat16()


def assert_bfloat16_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().max() / expected.abs().max()) < BF16_PERCENT / 100


@pytest.mark.parametrize("way", ["plain", "packed", "attention"])
@pytest.mark.parametrize("structure", ["dense", *STRUCTURES])
@pytest.mark.parametrize("family", ["llama", "starcoder2", "gemma2", "gpt2"])
def test_bfloat16_stays_near_the_forward_of_hugging_face(
    family: str, structure: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bfloat16_model(family, structure)
    ids = tiny_input_ids(batch=3, length=LENGTH + NUM_STEPS)
    expected = [logits_of_forward(model, ids, num_pads) for num_pads in PADS]
    if way == "packed":
        monkeypatch.setattr(packing, "MIN_BYTES", {})
        assert (pack_(model) > 0) == can_pack(model.lm_head.weight)
    if way == "attention":
        monkeypatch.setattr(attention, "FEWEST_PRODUCTS", 1)
        use_decode_attention(model)
        assert (model.config._attn_implementation == NAME) == (family != "gemma2")  # not of SDPA
    for num_pads, logits in zip(PADS, expected, strict=True):
        found = logits_of_steps(plain_steps(model, LENGTH + NUM_STEPS), ids, num_pads)
        assert_bfloat16_near(found, logits)


@pytest.mark.slow
def test_bfloat16_compiled_stays_near_the_forward_of_hugging_face() -> None:
    torch._dynamo.reset()
    model = bfloat16_model("starcoder2", "low_rank")
    ids = tiny_input_ids(batch=3, length=LENGTH + NUM_STEPS)
    expected = [logits_of_forward(model, ids, num_pads) for num_pads in PADS]
    use_decode_attention(model)
    with torch.no_grad():
        steps = GraphSteps(model, 3, LENGTH + NUM_STEPS, compiled=True)
    for num_pads, logits in zip(PADS, expected, strict=True):
        assert_bfloat16_near(logits_of_steps(steps, ids, num_pads), logits)


def test_the_page_states_the_tolerance_of_bfloat16() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "generate.md"
    assert f"within {BF16_PERCENT} % of the largest logit" in page.read_text(encoding="utf-8")


def test_rotary_embeddings_that_change_make_the_keys_anew() -> None:
    """Short factors up to 12 tokens, long ones after: the tokens of Hugging Face's ``generate``."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 12,
    }
    fields = {"original_max_position_embeddings": 12, "rope_parameters": rope}
    model = tiny_model("phi3", initializer_range=0.3, **fields)
    ids = tiny_input_ids(batch=2, length=LENGTH)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found = logits_of_steps(plain_steps(model, LENGTH + NUM_STEPS), expected[:, :-1], None).argmax(
        dim=-1
    )
    assert torch.equal(found, expected[:, LENGTH:])


class Operations(TorchDispatchMode):
    """Counts operations, and tensors of bool that they give: masks and looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_bool = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        self.num_bool += isinstance(output, Tensor) and output.dtype == torch.bool
        return output


@torch.no_grad()
def operations_of_step(model: PreTrainedModel, num_before: int) -> Operations:
    steps = CachedSteps(model, 40)
    steps.prefill(tiny_input_ids(batch=2, length=num_before), None)
    with Operations() as found:
        steps.step(torch.tensor([5, 6]))
    return found


@pytest.mark.parametrize("family", ["llama", "starcoder2", "qwen3", "mistral"])
def test_step_copies_no_keys_makes_no_mask_and_looks_at_no_value(family: str) -> None:
    model = tiny_model(family)
    assert model.config._attn_implementation == "sdpa"
    found = operations_of_step(model, 5)
    assert found.num_bool == 0
    assert found.counts["aten._local_scalar_dense.default"] == 0
    num_layers = model.config.num_hidden_layers
    cats = 1 + 2 * num_layers  # of the rotary embedding itself: the angles, and q and k turned
    assert found.counts["aten.cat.default"] == cats
    assert found.counts["aten.copy_.default"] == 2 * num_layers
    assert operations_of_step(model, 20).counts == found.counts


def test_grouped_heads_are_not_repeated() -> None:
    """The kernel gets the keys as they are stored, with fewer heads than the queries have."""
    model = tiny_model("llama")
    steps = CachedSteps(model, 20)
    with torch.no_grad():
        steps.prefill(tiny_input_ids(batch=2, length=6), None)
    cache = steps._cache
    assert isinstance(cache, StaticKVCache)
    assert cache.layers[0].keys.shape == (2, 2, 20, 8)
    found = operations_of_step(model, 5)
    for name in ("aten.clone.default", "aten.repeat.default", "aten.index_select.default"):
        assert found.counts[name] == 0, name

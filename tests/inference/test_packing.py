"""Packed weights on a model: which layers get them, and that nothing else changes."""

from __future__ import annotations

import copy
import filecmp
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import factorlm.inference.packing as packing
from factorlm.errors import ConfigError
from factorlm.inference import (
    Sampling,
    generate_tokens,
    pack_,
    premerge_,
    premerged_layers,
    unpack_,
    unpremerge_,
)
from factorlm.layers import (
    BlockShuffleConfig,
    LowRankConfig,
    LowRankLinear,
    MergePolicy,
    PackedLinear,
    PreMergedLinear,
    StructureConfig,
)
from factorlm.measure import has_fast_bf16
from factorlm.ops.packed import can_pack
from factorlm.surgery import attach_guides_, factorize_
from factorlm.testing.models import tiny_model

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _none_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MIN_BYTES", dict.fromkeys(packing.MIN_BYTES, 0))


def test_small_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 32))
    monkeypatch.setattr(packing, "MIN_BYTES", {torch.float32: 4 * 16 * 32})
    assert pack_(layers) == (4 * 16 * 32 if can_pack(layers[1].weight) else 0)
    assert type(layers[0]) is nn.Linear


LOW_RANK = LowRankConfig(rank=8)
PACKS = can_pack(torch.zeros(2, 2))
"""Whether float32 is packed here; all that is asked of results holds where it is not."""
NUM_DENSE, NUM_FACTORED = 16, 6
"""Of the model below: q, k, v, o of three layers, the first FFN, the head; the other FFNs."""
FFN_WEIGHTS = 32 * 80
FACTOR_WEIGHTS = 8 * (32 + 80)
ATTENTION_WEIGHTS = 2 * 32 * 32 + 2 * 32 * 16
HEAD_WEIGHTS = 99 * 32
DENSE_BYTES = 4 * (3 * ATTENTION_WEIGHTS + 3 * FFN_WEIGHTS + HEAD_WEIGHTS)
ALL_BYTES = DENSE_BYTES + 4 * NUM_FACTORED * FACTOR_WEIGHTS


def structured(
    config: StructureConfig = LOW_RANK, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Three decoder layers, the first dense; large weights, so that the tokens vary."""
    torch.manual_seed(0)
    model = tiny_model("llama", initializer_range=0.3)
    factorize_(model, config)
    return model.to(dtype).eval()


def kinds(model: nn.Module) -> Counter[str]:
    """Linear layers by kind; those that a layer with copies holds are not counted again."""
    held = {id(layer.structured) for layer in premerged_layers(model).values()}
    linears = (nn.Linear, LowRankLinear, PreMergedLinear)
    return Counter(
        type(module).__name__
        for module in model.modules()
        if isinstance(module, linears) and id(module) not in held
    )


def num_copies(model: nn.Module) -> int:
    return sum(
        module.has_copy if isinstance(module, PackedLinear) else module._packed.exists
        for module in model.modules()
        if isinstance(module, PackedLinear | PreMergedLinear)
    )


PLAIN = {"Linear": NUM_DENSE, "LowRankLinear": NUM_FACTORED}
PACKED = {"PackedLinear": NUM_DENSE, "PreMergedLinear": NUM_FACTORED} if PACKS else PLAIN


def test_it_computes_the_same() -> None:
    model = structured()
    with torch.no_grad():
        wanted = model(IDS).logits
        assert pack_(model) == PACKS * ALL_BYTES
        assert kinds(model) == PACKED
        assert num_copies(model) == 0
        found, again = model(IDS).logits, model(IDS).logits
    assert num_copies(model) == PACKS * (NUM_DENSE + NUM_FACTORED)
    assert torch.equal(found, again)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_blocks_are_left_alone_and_dense_layers_beside_them_are_not() -> None:
    model = structured(BlockShuffleConfig(num_blocks=2))
    with torch.no_grad():
        wanted = model(IDS).logits
        assert pack_(model) == PACKS * DENSE_BYTES
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not premerged_layers(model)


def test_it_generates_the_same() -> None:
    model = structured()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompts = [[5, 6, 7, 8], [90, 3], [17]]

    def tokens() -> list[list[int]]:
        sampling = Sampling(greedy=True)
        made = generate_tokens(model, prompts, max_new_tokens=12, sampling=sampling)
        return made.ids.tolist()

    wanted, by_hugging_face = tokens(), model.generate(IDS, **options)
    assert len(set(wanted[0])) > 2
    pack_(model)
    assert tokens() == wanted
    assert torch.equal(model.generate(IDS, **options), by_hugging_face)
    assert num_copies(model) == PACKS * (NUM_DENSE + NUM_FACTORED)


def test_the_files_are_the_same(tmp_path: Path) -> None:
    model = structured()
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    pack_(model)
    with torch.no_grad():
        model(IDS)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "packed")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert {"config.json", "model.safetensors"} <= set(files)
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == files
    same, *others = filecmp.cmpfiles(tmp_path / "plain", tmp_path / "packed", files, False)
    assert (same, others) == (files, [[], []])


def test_unpacked_nothing_is_left() -> None:
    model = structured()
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    pack_(model)
    with torch.no_grad():
        model(IDS)
    unpack_(model)
    assert [(name, module, type(module)) for name, module in model.named_modules()] == modules
    unpack_(model)
    assert kinds(model) == PLAIN
    assert pack_(model) == PACKS * ALL_BYTES


def test_twice_is_once() -> None:
    model = structured()
    pack_(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        assert pack_(model) == 0
        assert kinds(model) == PACKED
        assert torch.equal(model(IDS).logits, wanted)


def test_the_budget_goes_to_layers_in_order() -> None:
    """q and o are 4096 bytes, k and v 2048."""
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    for budget, wanted, used in (
        (0, [], 0),
        (2047, [], 0),
        (4095, first[1:2], 2048),
        (6144, first[:2], 6144),
        (4 * ATTENTION_WEIGHTS, first, 4 * ATTENTION_WEIGHTS),
    ):
        model = structured()
        assert pack_(model, memory_budget_bytes=budget) == PACKS * used
        found = [name for name, module in model.named_modules() if type(module) is PackedLinear]
        assert found == (wanted if PACKS else [])
        assert not premerged_layers(model)
    assert pack_(structured(), memory_budget_bytes=ALL_BYTES) == PACKS * ALL_BYTES
    assert pack_(structured(), memory_budget_bytes=ALL_BYTES - 1) < max(1, PACKS * ALL_BYTES)


def test_what_cannot_be_packed_is_left_alone() -> None:
    for dtype in (torch.float64, torch.float16):
        model = structured(dtype=dtype)
        assert pack_(model) == 0
        assert kinds(model) == PLAIN
    assert pack_(structured().to("meta")) == 0
    half = structured(dtype=torch.bfloat16)
    packs = has_fast_bf16("cpu") and torch.backends.mkldnn.is_available()
    with torch.no_grad():
        wanted = half(IDS).logits
        assert pack_(half) == packs * ALL_BYTES // 2
        torch.testing.assert_close(half(IDS).logits, wanted, rtol=0.1, atol=0.1)


def test_merged_layers_stay() -> None:
    model = structured()
    premerge_(model, MergePolicy.always())
    merged = premerged_layers(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        assert pack_(model) == PACKS * DENSE_BYTES
        assert premerged_layers(model) == merged
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    unpack_(model)
    assert premerged_layers(model) == merged
    assert kinds(model) == {"Linear": NUM_DENSE, "PreMergedLinear": NUM_FACTORED}


def test_unpremerged_and_unpacked_in_either_order() -> None:
    for undo in ((unpremerge_, unpack_), (unpack_, unpremerge_)):
        model = structured()
        pack_(model)
        for function in undo:
            function(model)
        assert kinds(model) == PLAIN


def test_a_shared_layer_has_one_copy() -> None:
    linear, layer = nn.Linear(8, 8), LowRankConfig(rank=2).build(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(linear, layer), "b": nn.Sequential(linear, layer)})
    assert pack_(model) == PACKS * 4 * (8 * 8 + 2 * (8 + 8))
    assert model["a"][0] is model["b"][0]
    assert model["a"][1] is model["b"][1]
    assert isinstance(model["a"][1], PreMergedLinear) == PACKS
    unpack_(model)
    assert model["a"][1] is model["b"][1] is layer


def test_a_tied_head_stays_tied() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", tie_word_embeddings=True).eval()
    pack_(model)
    with torch.no_grad():
        before = model(IDS).logits
        model.get_input_embeddings().weight.mul_(2)
        after = model(IDS).logits
        unpack_(model)
        wanted = model(IDS).logits
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.allclose(before, after, rtol=0.01)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_itself_a_linear() -> None:
    linear = nn.Linear(8, 4)
    assert pack_(linear) == PACKS * 4 * 8 * 4
    assert isinstance(linear, PackedLinear) == PACKS
    unpack_(linear)
    assert type(linear) is nn.Linear


def test_a_parametrised_layer_keeps_its_parametrisation() -> None:
    """It has a class of its own, which is not to be taken away."""
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    pack_(model)
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    assert pack_(model) == 0
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = nn.functional.linear(x, model[0].weight, model[0].bias)
        unpack_(model)
        torch.testing.assert_close(model(x), wanted)


def test_refusals() -> None:
    model = structured()
    with pytest.raises(ConfigError, match="memory_budget_bytes=-1 must be at least 0"):
        pack_(model, memory_budget_bytes=-1)
    with pytest.raises(ConfigError, match="the model itself is the layer: use PreMergedLinear"):
        pack_(LowRankConfig(rank=1).build(4, 4))
    attach_guides_(model)
    with pytest.raises(ConfigError, match="has guides attached: detach_guides_ first"):
        pack_(model)
    assert not any(isinstance(m, PackedLinear | PreMergedLinear) for m in model.modules())


def test_trained_after_packing_it_computes_with_the_new_weights() -> None:
    model, twin = structured(), structured()
    pack_(model)
    with torch.no_grad():
        before = model(IDS).logits
    for trained in (model, twin):
        trained.train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.05, fused=True)
        trained(IDS, labels=IDS).loss.backward()
        optimizer.step()
        trained.eval()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert num_copies(model) == 0
    with torch.no_grad():
        after, wanted = model(IDS).logits, twin(IDS).logits
    assert not torch.allclose(after, before, rtol=0.01)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = structured()
    pack_(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        other = copy.deepcopy(model)
        assert num_copies(other) == 0
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(IDS).logits.any()
        assert torch.equal(model(IDS).logits, wanted)

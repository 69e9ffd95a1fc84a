"""Initial weights: the family's own, and equal whatever the machine looks like."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from factorlm.anatomy import decoder_layers
from factorlm.errors import ConfigError
from factorlm.hf import build_causal_lm, initialize_, materialize_
from factorlm.layers import BlockShuffleConfig, LowRankConfig, StructureConfig, StructuredLinear
from factorlm.testing.distributed import run_distributed
from factorlm.testing.models import TINY_CONFIGS, tiny_model


def build(family: str, **arguments: object) -> PreTrainedModel:
    structure = None if family == "mixtral" else LowRankConfig(rank=4)
    return build_causal_lm(TINY_CONFIGS[family](), structure, **arguments)  # type: ignore[arg-type]


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_parameters_are_drawn_as_the_family_draws_them(family: str) -> None:
    """Against transformers' own construction: equal constants, equal deviations."""
    ours = build_causal_lm(TINY_CONFIGS[family]())
    theirs = tiny_model(family, seed=1)
    for name, expected in theirs.named_parameters():
        value = ours.get_parameter(name)
        spread = float(expected.detach().std(correction=0))
        if spread == 0:
            assert torch.equal(value, expected), name
        else:
            # The deviation of a sample of n has a relative error of 1/sqrt(2n).
            tolerance = 6 / math.sqrt(2 * expected.numel())
            assert float(value.detach().std()) == pytest.approx(spread, rel=tolerance), name


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_buffers_are_computed_and_weights_tied(family: str) -> None:
    ours, theirs = build(family), tiny_model(family)
    buffers = dict(ours.named_buffers())
    assert list(buffers) == [name for name, _ in theirs.named_buffers()]
    for name, expected in theirs.named_buffers():
        assert torch.equal(buffers[name], expected), name
    head, table = ours.get_output_embeddings(), ours.get_input_embeddings()
    assert (head.weight is table.weight) == ours.config.tie_word_embeddings


def test_a_parents_rule_for_its_child_is_kept() -> None:
    """GPT-2 divides the residual projections by the root of their number."""
    model = build_causal_lm(TINY_CONFIGS["gpt2"](), n_embd=128)
    for block in model.transformer.h:
        for module, std in ((block.attn.c_proj, 0.02 / math.sqrt(6)), (block.attn.c_attn, 0.02)):
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.05)


def test_a_structured_layer_has_the_familys_deviation() -> None:
    config = TINY_CONFIGS["llama"]()
    model = build_causal_lm(config, LowRankConfig(rank=32), initializer_range=0.3)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert float(weight.std()) == pytest.approx(0.3, rel=0.06)


def test_seed_and_name_decide_and_nothing_else() -> None:
    first = build("starcoder2", seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = build("starcoder2", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, second)
    assert not same(first, build("starcoder2", seed=4))
    # A deeper model has the same first layers.
    deeper = build_causal_lm(
        TINY_CONFIGS["starcoder2"](), LowRankConfig(rank=4), seed=3, num_hidden_layers=5
    )
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, deeper.get_parameter(name))


def test_layers_differ_from_each_other() -> None:
    layers = build("llama").model.layers
    assert not torch.equal(layers[1].mlp.up_proj.U, layers[2].mlp.up_proj.U)
    assert not torch.equal(layers[1].self_attn.q_proj.weight, layers[2].self_attn.q_proj.weight)


def test_dtype_rounds_the_same_draw() -> None:
    wide, narrow = build("llama"), build("llama", dtype=torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, wide.get_parameter(name).bfloat16())
    # Rotary frequencies are not rounded.
    assert torch.equal(narrow.model.rotary_emb.inv_freq, wide.model.rotary_emb.inv_freq)


def test_wrappers_are_left_out_of_names() -> None:
    model = build("llama", seed=7)
    expected = [parameter.clone() for parameter in model.parameters()]
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    initialize_(model, 8)
    assert not torch.equal(list(model.parameters())[5], expected[5])
    initialize_(model, 7)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)


def test_what_constructors_alone_set_comes_from_them() -> None:
    """The first GPT leaves its Conv1D weights to the constructor; Apertus its activation."""
    config = CONFIG_MAPPING["openai-gpt"](vocab_size=99, n_embd=64, n_layer=3, n_head=4)
    model = build_causal_lm(config, LowRankConfig(rank=4), seed=3)
    assert same(model, build_causal_lm(config, LowRankConfig(rank=4), seed=3))
    weights = [block.attn.c_attn.weight.detach() for block in model.transformer.h]
    for weight in weights:
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weights[0], weights[1])
    other = build_causal_lm(config, LowRankConfig(rank=4), seed=4)
    assert not torch.equal(other.transformer.h[0].attn.c_attn.weight, weights[0])


def test_a_parameter_that_nothing_sets_is_refused() -> None:
    model = build("llama", device="meta")
    model.model.layers[0].gain = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.gain: nothing in the .* initialises it"
    ):
        materialize_(model, device="cpu", seed=0)


def test_meta_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="on the meta device"):
        initialize_(build("llama", device="meta"), 0)


STRUCTURES = [LowRankConfig(rank=4), BlockShuffleConfig(num_blocks=4), None]


def _sharded(structure: StructureConfig | None) -> dict[str, torch.Tensor]:
    """Full tensors of a model that was built on meta, sharded, then initialised; on each rank."""
    model = build_causal_lm(TINY_CONFIGS["starcoder2"](), structure, device="meta", seed=5)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.ndim == 3 else None

    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    materialize_(model, device="cpu", seed=5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    full = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    logits = model(torch.arange(10)[None]).logits.detach()
    return {name: tensor.detach() for name, tensor in full.items()} | {"logits": logits}


def _all_sharded() -> list[dict[str, torch.Tensor]]:
    return [_sharded(structure) for structure in STRUCTURES]


@pytest.mark.slow
def test_two_sharded_processes_start_where_one_does() -> None:
    ranks = run_distributed(_all_sharded, 2)
    for index, structure in enumerate(STRUCTURES):
        model = build_causal_lm(TINY_CONFIGS["starcoder2"](), structure, seed=5)
        expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for rank in ranks:
            found = dict(rank[index])
            torch.testing.assert_close(
                found.pop("logits"), model(torch.arange(10)[None]).logits.detach()
            )
            assert list(found) == list(expected)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            if structure is not None:
                assert any(isinstance(m, StructuredLinear) for m in model.modules())


def test_on_the_meta_device_nothing_is_allocated() -> None:
    with torch.device("cpu"):
        model = build("llama", device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_it_is_what_from_config_would_build() -> None:
    config = TINY_CONFIGS["qwen2"]()
    ours = build_causal_lm(config, attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert str(ours) == str(theirs)
    assert ours.config._attn_implementation == "eager"

"""FFNs that keep their rank-R activations only, and those of blocks, which keep none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from factorlm.accounting import guide_flops, training_flops
from factorlm.errors import ConfigError
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    StructureConfig,
)
from factorlm.surgery import attach_guides_, factorize_, guided_layers
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids
from factorlm.train.recompute import recompute_ffns_

STRUCTURES = [
    LowRankConfig(rank=5),
    BlockShuffleConfig(num_blocks=4),
    BlockDenseConfig(num_blocks=2, rank=10),
]
LENGTH = 10
by_kind = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda config: config.kind)


def build(structure: StructureConfig, family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    config = TINY_CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    factorize_(model, structure)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = tiny_input_ids(batch=2, length=LENGTH)
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wrapper = "_checkpoint_wrapped_module."
    return {name.replace(wrapper, ""): p.grad for name, p in model.named_parameters()}


@by_kind
@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
@pytest.mark.parametrize("form", [None, "merged", "two_path"])
def test_gradients_are_the_same_bits(
    family: str, structure: StructureConfig, form: str | None
) -> None:
    model = build(structure, family)
    if form is not None:
        attach_guides_(model, form=form)  # type: ignore[arg-type]
        for layer in guided_layers(model).values():
            layer.set_alpha(0.5)
    plain = gradients(copy.deepcopy(model))
    names = list(model.state_dict())
    assert len(recompute_ffns_(model)) == 3
    found = gradients(model)
    assert list(model.state_dict()) == names
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@by_kind
@pytest.mark.parametrize("family", ["llama", "starcoder2"])
@pytest.mark.parametrize("form", [None, "merged", "two_path"])
def test_flops_are_those_that_torch_counts(
    family: str, structure: StructureConfig, form: str | None
) -> None:
    model = build(structure, family)
    tokens = 2 * LENGTH
    wanted = training_flops(
        model, seq_len=LENGTH, num_tokens=tokens, activation_checkpointing="ffn"
    )
    if form is not None:
        wanted += guide_flops(
            model,
            tokens_per_step=tokens,
            tokens_per_forward=tokens,
            form=form,  # type: ignore[arg-type]
            activation_checkpointing="ffn",
        )
        attach_guides_(model, form=form)  # type: ignore[arg-type]
    recompute_ffns_(model)
    ids = tiny_input_ids(batch=2, length=LENGTH)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() == wanted.executed_flops > wanted.model_flops


def kept_bytes(ffn: nn.Module, x: torch.Tensor) -> int:
    """What the forward pass allocates and does not free, its result left out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        y = ffn(x)
    kept = sum(event.self_cpu_memory_usage for event in found.events())
    return kept - y.nbytes


@pytest.mark.parametrize("num_tokens", [64, 130])
@pytest.mark.parametrize(
    ("structure", "num_values"),
    [
        (LowRankConfig(rank=4), 3 * 4),
        (BlockShuffleConfig(num_blocks=4), 0),
        (BlockDenseConfig(num_blocks=2, rank=4), 0),
    ],
    ids=["low_rank", "block_shuffle", "block_dense"],
)
def test_only_the_narrow_activations_are_kept(
    structure: StructureConfig, num_values: int, num_tokens: int
) -> None:
    """Of three linears in a 1024-wide FFN of rank 4: 4 values a token each, or none of blocks."""
    config = TINY_CONFIGS["llama"]()
    config.intermediate_size = 1024
    model = AutoModelForCausalLM.from_config(config)
    factorize_(model, structure, keep_first_dense=False)
    x = torch.randn(1, num_tokens, config.hidden_size, requires_grad=True)
    plain = kept_bytes(model.model.layers[0].mlp, x)
    recompute_ffns_(model)
    kept = kept_bytes(model.model.layers[0].mlp, x)
    assert plain >= 3 * num_tokens * 1024 * 4
    wanted = num_tokens * num_values * 4 + torch.get_rng_state().nbytes  # for dropout
    assert wanted <= kept < wanted + num_tokens * 4  # not one value a token more


def test_a_layer_without_a_module_for_its_ffn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation_checkpointing='ffn': OPT.* no module"):
        recompute_ffns_(build(LowRankConfig(rank=5), "opt"))

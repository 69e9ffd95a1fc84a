"""FLOPs against PyTorch's own counter, which sees every matmul that a built model runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from factorlm.accounting import attention_shapes, flops_per_token, training_flops
from factorlm.anatomy import anatomy_of
from factorlm.errors import ConfigError
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig
from factorlm.surgery import factorize_
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids

BATCH, LENGTH = 2, 10

OTHER_CONFIGS = {
    "latent attention": CONFIG_MAPPING["deepseek_v3"](
        vocab_size=99,
        hidden_size=32,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=7,
    ),
    "projected embedding": CONFIG_MAPPING["opt"](
        vocab_size=99,
        hidden_size=32,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "wide": CONFIG_MAPPING["starcoder2"](
        vocab_size=99,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
CONFIGS = {name: build() for name, build in TINY_CONFIGS.items()} | OTHER_CONFIGS


def build(name, device="cpu"):
    """Attention and experts as plain matmuls, which the counter sees."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    if anatomy_of(model).experts:
        model.set_experts_implementation("eager")
    return model


def run(model):
    ids = tiny_input_ids(batch=BATCH, length=LENGTH).to(model.device)
    positions = torch.arange(LENGTH, device=model.device)[None]
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, device=model.device)
    on_meta = {"attention_mask": mask, "position_ids": positions} if ids.is_meta else {}
    return model(input_ids=ids, labels=ids, use_cache=False, **on_meta)


def counted_forward(model) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model)
    return counter.get_total_flops()


def counted_training(model) -> int:
    model.train()
    with FlopCounterMode(display=False) as counter:
        run(model).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_forward_equals_torch_counter(name):
    model = build(name)
    assert counted_forward(model) == flops_per_token(model, LENGTH).total * BATCH * LENGTH


@pytest.mark.parametrize("name", ["starcoder2", "llama"])
def test_forward_equals_torch_counter_on_meta(name):
    model = build(name, device="meta")
    assert counted_forward(model) == flops_per_token(model, LENGTH).total * BATCH * LENGTH


@pytest.mark.parametrize(
    "config",
    [
        LowRankConfig(rank=5),
        BlockShuffleConfig(num_blocks=4),
        BlockDenseConfig(num_blocks=2, rank=10),
    ],
    ids=lambda config: config.kind,
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "starcoder2", "phi3", "gemma2"])
def test_structured_forward_equals_torch_counter(name, config):
    model = build(name)
    dense = flops_per_token(model, LENGTH)
    factorize_(model, config)
    structured = flops_per_token(model, LENGTH)
    assert counted_forward(model) == structured.total * BATCH * LENGTH
    assert structured.ffn < dense.ffn
    assert structured.total - structured.ffn == dense.total - dense.ffn


@pytest.mark.parametrize("name", ["gpt2", "llama", "starcoder2", "phi3", "gemma2", "opt"])
@pytest.mark.parametrize("structured", [False, True])
def test_training_equals_torch_counter(name, structured):
    model = build(name)
    if structured:
        factorize_(model, LowRankConfig(rank=5))
    flops = training_flops(model, seq_len=LENGTH, num_tokens=BATCH * LENGTH)
    assert counted_training(model) == flops.model_flops == flops.executed_flops


@pytest.mark.parametrize("name", ["gpt2", "llama", "starcoder2", "gemma2"])
def test_recomputation_equals_torch_counter(name):
    model = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    flops = training_flops(
        model, seq_len=LENGTH, num_tokens=BATCH * LENGTH, activation_checkpointing=True
    )
    # PyTorch stops a recomputation as soon as nothing more is needed: here it runs to its end.
    with set_checkpoint_early_stop(False):
        assert counted_training(model) == flops.executed_flops > flops.model_flops


def test_parts_of_grouped_query_attention():
    """The papers' formula with a = 24, H = 32, one key-value head for three of queries."""
    flops = flops_per_token(build("wide", device="meta"), LENGTH)
    assert flops.attention_projections == 2 * (2 * 2 * 24 * 32 + 2 * 2 * 8 * 32)
    assert flops.attention_scores == 2 * (4 * LENGTH * 24)
    assert flops.ffn == 2 * (2 * 2 * 32 * 80)
    assert flops.head == 2 * 99 * 32


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"mpt"}))
def test_cache_width_equals_what_generation_keeps(name):
    model = build(name)
    with torch.no_grad():
        cache = model(input_ids=tiny_input_ids(batch=1, length=1), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert sum(shape.cache_width for shape in attention_shapes(model)) == kept


def test_a_sliding_window_does_not_change_the_convention():
    model = build("gemma2", device="meta")
    model.config.sliding_window = 2
    doubled = flops_per_token(model, 2 * LENGTH).attention_scores
    assert doubled == 2 * flops_per_token(model, LENGTH).attention_scores


def test_a_state_space_mixer_has_no_attention_scores():
    with torch.device("meta"):
        config = CONFIG_MAPPING["mamba"](vocab_size=99, hidden_size=32, num_hidden_layers=2)
        model = AutoModelForCausalLM.from_config(config)
    flops = flops_per_token(model, LENGTH)
    assert flops.attention_scores == 0
    assert flops.attention_projections > 0


def test_unknown_routing_is_refused():
    model = build("llama", device="meta")
    model.model.layers[0].mlp.experts = nn.Parameter(torch.empty(4, 32, 32, device="meta"))
    with pytest.raises(ConfigError, match="num_experts_per_tok=None"):
        flops_per_token(model, LENGTH)


def test_a_sequence_has_a_token():
    with pytest.raises(ConfigError, match="seq_len=0"):
        flops_per_token(build("llama", device="meta"), 0)


def test_prints_as_a_table():
    text = str(flops_per_token(build("llama", device="meta"), LENGTH))
    assert text.splitlines()[-1].split()[0] == "total"

"""Memory against what PyTorch holds: parameters, moments, and tensors saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from factorlm.accounting import estimate_memory
from factorlm.errors import ConfigError
from factorlm.hf import build_causal_lm
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig
from factorlm.ops.cross_entropy import CHUNK_ELEMENTS
from factorlm.optim import build_optimizer
from factorlm.surgery import attach_guides_
from factorlm.testing.models import tiny_model

BATCH, LENGTH = 2, 37


def build(preset, num_layers, device="cpu", structure=None):
    return build_causal_lm(
        preset,
        structure,
        device=device,
        vocab_size=101,
        num_hidden_layers=num_layers,
    ).train()


def saved_bytes(model, precision):
    """Bytes of all storages saved for backward but weights and their half-precision copies."""
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    sizes, alive = {}, []

    def pack(tensor):
        if tuple(tensor.shape) not in shapes:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(101, (BATCH, LENGTH))
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with saved_tensors_hooks(pack, lambda tensor: tensor), half:
        model.model(input_ids=ids, use_cache=False)
    return sum(sizes.values())


def estimated(preset, num_layers, precision, structure=None, **fields):
    model = build(preset, num_layers, device="meta", structure=structure)
    return estimate_memory(
        model, micro_batch=BATCH, seq_len=LENGTH, precision=precision, **fields
    ).activations_bytes


STRUCTURES = [
    None,
    LowRankConfig(rank=24),
    BlockShuffleConfig(num_blocks=4),
    BlockDenseConfig(num_blocks=2, rank=24),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda config: config and config.kind)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["gpt_tiny", "llama_tiny"])
def test_activations_of_a_layer_are_what_autograd_saves(preset, precision, structure):
    def per_layer(measure):
        return measure(3) - measure(2)

    measured = per_layer(lambda n: saved_bytes(build(preset, n, structure=structure), precision))
    counted = per_layer(lambda n: estimated(preset, n, precision, structure))
    assert counted == pytest.approx(measured, rel=0.06)


def test_activation_checkpointing_keeps_layer_inputs_and_one_layer():
    def recomputed(num_layers):
        return estimated("gpt_tiny", num_layers, "fp32", activation_checkpointing=True)

    inputs = BATCH * LENGTH * 128 * 4
    assert recomputed(6) - recomputed(5) == inputs
    assert recomputed(1) == estimated("gpt_tiny", 1, "fp32") + inputs


def test_recomputed_ffns_keep_their_input_and_rank_r_activations():
    """Width 128, an up and a down projection of rank 24 in every layer but the first."""

    def step(recompute):
        counts = [
            estimated(
                "gpt_tiny", n, "fp32", LowRankConfig(rank=24), activation_checkpointing=recompute
            )
            for n in (5, 6)
        ]
        return (counts[1] - counts[0]) / (BATCH * LENGTH * 4)

    wide = (
        128 + 512 + 512 + 24 + 24
    )  # inputs of both linears, what GELU reads, what factors pass on
    assert step(False) - step("ffn") == wide - (128 + 24 + 24)


@pytest.mark.parametrize("kind", ["adamw", "muon", "spectron", "lora_muon"])
@pytest.mark.parametrize("guided", [False, True])
def test_weights_gradients_and_moments_are_what_torch_holds(guided, kind):
    model = build("gpt_tiny", 2, structure=LowRankConfig(rank=24))
    if guided:
        attach_guides_(model)
    optimizer = build_optimizer(model, kind=kind, learning_rate=1e-3)
    ids = torch.randint(101, (1, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    memory = estimate_memory(model, micro_batch=1, seq_len=5, optimizer=kind)
    left_out = ("step", "right_vectors")
    states = optimizer.state.values()
    moments = [t for state in states for key, t in state.items() if key not in left_out]
    assert memory.weights_bytes == sum(p.nbytes for p in model.parameters())
    assert memory.gradients_bytes == sum(p.grad.nbytes for p in model.parameters())
    assert memory.optimizer_bytes == sum(t.nbytes for t in moments)


@pytest.mark.parametrize("form", ["merged", "two_path"])
def test_a_half_precision_guide_is_kept_once_for_backward(form):
    """Two linears of the second layer have one, (512, 128) and (128, 512)."""
    model = build("gpt_tiny", 2, structure=LowRankConfig(rank=24))
    alone = estimate_memory(model, micro_batch=BATCH, seq_len=LENGTH, precision="bf16")
    attach_guides_(model, form=form)
    memory = estimate_memory(model, micro_batch=BATCH, seq_len=LENGTH, precision="bf16")
    layer = model.get_submodule("model.layers.1.mlp.c_fc")
    kept = {}

    def pack(tensor):
        if {*tensor.shape} == {512, 128} and tensor.dtype == torch.bfloat16:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(BATCH, LENGTH, 128, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    (copy,) = kept.values()
    assert memory.autocast_bytes - alone.autocast_bytes == 2 * copy.nbytes
    assert memory.activations_bytes == alone.activations_bytes


def test_the_cache_holds_keys_and_values_in_the_matmul_dtype():
    model = tiny_model("llama", device="meta")
    full = estimate_memory(model, micro_batch=1, seq_len=1)
    half = estimate_memory(model, micro_batch=1, seq_len=1, precision="bf16")
    assert full.kv_cache_bytes_per_token == 3 * 2 * 16 * 4
    assert half.kv_cache_bytes_per_token == 3 * 2 * 16 * 2


def test_logits_never_exceed_one_chunk():
    model = build_causal_lm("gpt_s", device="meta")
    short, long = (estimate_memory(model, micro_batch=n, seq_len=1024) for n in (16, 32))
    assert long.loss_bytes - short.loss_bytes == 16 * 1024 * 768 * 4
    assert short.loss_bytes == 4 * (2 * CHUNK_ELEMENTS + 32000 * 768 + 16 * 1024 * 768)


def test_the_step_is_the_sum_without_the_cache():
    memory = estimate_memory(tiny_model("phi3", device="meta"), micro_batch=2, seq_len=8)
    assert memory.step_bytes == (
        memory.weights_bytes
        + memory.gradients_bytes
        + memory.optimizer_bytes
        + memory.autocast_bytes
        + memory.activations_bytes
        + memory.loss_bytes
    )


@pytest.mark.parametrize("field", ["micro_batch", "seq_len"])
def test_sizes_are_at_least_one(field):
    sizes = {"micro_batch": 1, "seq_len": 1} | {field: 0}
    with pytest.raises(ConfigError, match=f"{field}=0"):
        estimate_memory(tiny_model("llama", device="meta"), **sizes)

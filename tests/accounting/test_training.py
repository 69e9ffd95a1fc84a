"""FLOPs of guided steps against PyTorch's own counter, which sees every matmul that is run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from factorlm.accounting import TrainingFlops, guide_flops, training_flops
from factorlm.errors import ConfigError
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig
from factorlm.optim import build_optimizer
from factorlm.surgery import attach_guides_, factorize_, guided_layers
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids

LENGTH = 10
STRUCTURES = [
    LowRankConfig(rank=5),
    BlockShuffleConfig(num_blocks=4),
    BlockDenseConfig(num_blocks=2, rank=10),
]


def build(family="llama", structure=STRUCTURES[0]):
    """Attention as plain matmuls, which the counter sees; a model of three layers."""
    torch.manual_seed(0)
    config = TINY_CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    factorize_(model, structure)
    return model.train()


def guided(model, form, *, skipped=False):
    attach_guides_(model, form=form)
    for layer in guided_layers(model).values():
        layer.set_alpha(0.5, skipped=skipped)
    return model


def counted(model, batch=2, passes=1, optimizer=None):
    """Of one optimizer step over ``passes`` forward passes of ``batch`` sequences."""
    ids = tiny_input_ids(batch=batch, length=LENGTH)
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        for _ in range(passes):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return counter.get_total_flops()


def expected(model, batch=2, passes=1, optimizer="adamw", form="auto", recompute=False):
    """Of a step without guides, and what a guide adds; ``model`` has none."""
    tokens = batch * passes * LENGTH
    shared = {"optimizer": optimizer, "activation_checkpointing": recompute}
    alone = training_flops(model, seq_len=LENGTH, num_tokens=tokens, num_steps=1, **shared)
    sizes = {"tokens_per_step": tokens, "tokens_per_forward": batch * LENGTH}
    return alone, guide_flops(model, **sizes, form=form, **shared)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("form", ["merged", "two_path"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda config: config.kind)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_guided_step_equals_torch_counter(family, structure, form, recompute):
    model = build(family, structure)
    alone, added = expected(model, form=form, recompute=recompute)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert counted(model) == alone.executed_flops
    assert counted(guided(model, form)) == (alone + added).executed_flops


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda config: config.kind)
def test_a_step_that_leaves_the_guide_out_adds_nothing(structure):
    model = build("llama", structure)
    alone, _ = expected(model)
    assert counted(guided(model, "merged", skipped=True)) == alone.executed_flops


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda config: config.kind)
def test_auto_takes_the_form_with_fewer_flops(structure, batch):
    model = build("llama", structure)
    forms = {form: expected(model, batch, form=form)[1] for form in ("merged", "two_path")}
    alone, added = expected(model, batch)
    assert added.executed_flops == min(flops.executed_flops for flops in forms.values())
    assert counted(guided(model, "auto"), batch) == (alone + added).executed_flops


def test_both_forms_are_the_cheaper_one_somewhere():
    """Merging low_rank pays from 32 x 80 / (32 + 80) = 22.9 tokens a pass on."""
    model = build()
    for batch, cheaper in ((2, "two_path"), (3, "merged")):
        other = {"merged": "two_path", "two_path": "merged"}[cheaper]
        best, worst = (expected(model, batch, form=form)[1] for form in (cheaper, other))
        assert best.executed_flops < worst.executed_flops


@pytest.mark.parametrize("form", ["merged", "two_path"])
def test_every_accumulated_pass_merges_anew(form):
    model = build()
    alone, added = expected(model, passes=3, form=form)
    assert counted(guided(model, form), passes=3) == (alone + added).executed_flops


@pytest.mark.parametrize(("tokens", "passes"), [(40, 2), (50, 3), (60, 3)])
def test_a_shorter_last_pass_merges_too(tokens, passes):
    """Six linears of 2560 weights, 560 of them in factors of rank 5, in passes of 20 tokens."""
    sizes = {"tokens_per_step": tokens, "tokens_per_forward": 20}
    added = guide_flops(build(), **sizes, form="merged")
    matmuls, merges = 2 * (2560 - 560) * tokens, 2 * 5 * 2560 * passes
    assert added.executed_flops == 6 * 3 * (matmuls + merges)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda config: config.kind)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizers_matmuls_are_counted(kind, structure):
    model = build("llama", structure)
    alone, added = expected(model, passes=2, optimizer=kind)
    guided(model, "auto")
    optimizer = build_optimizer(model, kind=kind, learning_rate=1e-3)
    assert counted(model, passes=2, optimizer=optimizer) == (alone + added).executed_flops
    for layer in guided_layers(model).values():
        layer.set_alpha(0.5, skipped=True)
    assert counted(model, passes=2, optimizer=optimizer) == alone.executed_flops


def test_the_papers_convention_counts_the_dense_matmul_however_it_is_run():
    """Six llama linears of 32 x 80 are structured: 6 FLOPs a weight and token."""
    model = build()
    for form in ("auto", "merged", "two_path"):
        for optimizer in ("adamw", "muon"):
            for recompute in (False, True):
                _, added = expected(model, 3, 2, optimizer, form, recompute)
                assert added.model_flops == 6 * (6 * 32 * 80) * (3 * 2 * LENGTH)


def test_a_dense_model_cannot_be_guided():
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"]())
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no structured layer to guide"):
        guide_flops(model, tokens_per_step=10, tokens_per_forward=10)


def test_sums_and_multiples():
    one = TrainingFlops(2, 3)
    assert one + one == one.times(2) == TrainingFlops(4, 6)
    assert one.times(0.5) == TrainingFlops(1, 2)  # 1.5 rounds to the even number

"""Parameters by part, on every tiny family, dense and structured, real and on meta."""

from __future__ import annotations

import pytest
from torch import nn

from factorlm.accounting import ParamCount, count_params
from factorlm.layers import BlockShuffleConfig, LowRankConfig
from factorlm.surgery import factorize_
from factorlm.testing.models import HIDDEN_SIZE as H
from factorlm.testing.models import INTERMEDIATE_SIZE as F
from factorlm.testing.models import TINY_CONFIGS, VOCAB_SIZE, tiny_model


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_parts_add_up_to_every_parameter(family):
    model = tiny_model(family, device="meta")
    assert count_params(model).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_weights_leave_out_what_has_one_dimension(family):
    """Biases and norms are the vectors of a model, but for the biases of experts."""
    model = tiny_model(family, device="meta")
    assert count_params(model).weights == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_parts_of_a_llama():
    L, V, kv = 3, VOCAB_SIZE, H // 2
    assert count_params(tiny_model("llama", device="meta")) == ParamCount(
        embedding=V * H,
        attention=L * (2 * H * H + 2 * H * kv),
        ffn=L * 3 * H * F,
        head=V * H,
        other=0,
        norm=(2 * L + 1) * H,
        bias=0,
    )


def test_a_tied_head_counts_once_and_biases_apart():
    count = count_params(tiny_model("starcoder2", device="meta"))
    assert (count.embedding, count.head) == (VOCAB_SIZE * H, 0)
    assert count.bias == 3 * (2 * H + 2 * H // 2 + F + H)
    assert count.norm == 7 * 2 * H


def test_learned_positions_are_part_of_the_embedding():
    count = count_params(tiny_model("gpt2", device="meta"))
    assert count.embedding == (VOCAB_SIZE + 64) * H
    assert count.non_embedding == count.total - count.embedding


def test_experts_are_ffn_and_routers_are_not():
    count = count_params(tiny_model("mixtral", device="meta"))
    assert count.ffn == 3 * 4 * 3 * H * F
    assert count.other == 3 * 4 * H


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("config", [LowRankConfig(rank=5), BlockShuffleConfig(num_blocks=4)])
def test_structured_layers_count_their_factors(config, device):
    model = tiny_model("starcoder2", device=device)
    before = count_params(model)
    factorize_(model, config)
    after = count_params(model)
    assert after.ffn == 2 * H * F + 2 * (config.num_params(H, F) + config.num_params(F, H))
    assert after.total == sum(p.numel() for p in model.parameters())
    assert (after.bias, after.norm) == (before.bias, before.norm)


def test_shared_layers_count_once():
    model = tiny_model("llama", device="meta")
    before = count_params(model)
    model.model.layers[2].mlp = model.model.layers[1].mlp
    assert before.ffn - count_params(model).ffn == 3 * H * F


def test_a_model_of_another_kind_is_all_other():
    count = count_params(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    assert (count.other, count.bias, count.total) == (32, 9, 41)


def test_prints_as_a_table():
    lines = str(count_params(tiny_model("llama", device="meta"))).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["embedding", "attention", "ffn"]
    assert lines[7].split() == ["total", f"{count_params(tiny_model('llama')).total:,}"]
    assert len({len(line) for line in lines}) == 1

"""Matmul FLOPs of a step, against what PyTorch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from factorlm.errors import ConfigError
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, StructureConfig
from factorlm.optim import build_optimizer, guide_optimizer_flops, optimizer_flops
from factorlm.surgery import factorize_
from factorlm.surgery.guides import attach_guides_
from factorlm.testing.models import tiny_model
from factorlm.train.config import BatchSection, ModelSection, OptimizerSection, TrainConfig
from factorlm.train.describe import describe

STRUCTURES: list[StructureConfig | None] = [
    None,
    LowRankConfig(rank=8),
    BlockShuffleConfig(num_blocks=4),
    BlockDenseConfig(num_blocks=2, rank=8),
]


def counted(model: torch.nn.Module, kind: str) -> int:
    """Of the second step: the first starts the power iteration."""
    optimizer = build_optimizer(model, kind=kind, learning_rate=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["adamw", "muon", "spectron"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_step_takes_what_pytorch_counts(structure: StructureConfig | None, kind: str) -> None:
    model, meta = tiny_model("llama"), tiny_model("llama", device="meta")
    if structure is not None:
        factorize_(model, structure)
        factorize_(meta, structure)
    wanted = counted(model, kind)
    assert optimizer_flops(meta, kind) == wanted
    assert (wanted == 0) == (kind == "adamw")


def test_a_step_of_lora_muon_takes_what_pytorch_counts() -> None:
    """It serves plain pairs only."""
    model = tiny_model("llama")
    factorize_(model, LowRankConfig(rank=8))
    assert optimizer_flops(model, "lora_muon") == counted(model, "lora_muon")


@pytest.mark.parametrize("structure", STRUCTURES[2:], ids=str)
def test_lora_muon_on_blocks_is_refused_by_name_also_in_a_description(
    structure: StructureConfig,
) -> None:
    message = r"shape=\(\d, \d+, \d+\) of a group with rule='lora_muon' must be a matrix"
    model = tiny_model("llama", device="meta")
    factorize_(model, structure)
    with pytest.raises(ConfigError, match=message):
        optimizer_flops(model, "lora_muon")
    config = TrainConfig(
        name="blocks",
        model=ModelSection(preset="gpt_nano", vocab_size=256),
        structure={"structure": structure.kind, **structure.to_dict()},
        optimizer=OptimizerSection(kind="lora_muon"),
        batch=BatchSection(num_steps=2),
    )
    with pytest.raises(ConfigError, match=message):
        describe(config)


@pytest.mark.parametrize("kind", ["adamw", "muon", "spectron"])
def test_guides_are_left_out_and_counted_on_their_own(kind: str) -> None:
    model = tiny_model("llama")
    factorize_(model, LowRankConfig(rank=8))
    alone = optimizer_flops(model, kind)
    attach_guides_(model)
    assert optimizer_flops(model, kind) == alone
    guides = 4 * guide_optimizer_flops(32, 80, kind) + 2 * guide_optimizer_flops(80, 32, kind)
    assert counted(model, kind) == alone + guides


def test_what_is_frozen_is_not_counted() -> None:
    model = tiny_model("llama", device="meta")
    whole = optimizer_flops(model, "muon")
    model.get_submodule("model.layers.0").requires_grad_(False)
    assert 3 * optimizer_flops(model, "muon") == 2 * whole


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.kind='sgd' must be one of"):
        guide_optimizer_flops(2, 3, "sgd")

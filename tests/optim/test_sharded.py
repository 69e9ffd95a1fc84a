"""Parameters that FSDP2 shards move as whole ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from factorlm.layers import BlockDenseConfig, LowRankConfig
from factorlm.optim import FactorOptimizer, build_optimizer
from factorlm.surgery import factorize_
from factorlm.testing import run_distributed
from factorlm.testing.models import tiny_input_ids, tiny_model
from factorlm.train.state import full, load_optimizer_, optimizer_tensors

Cases = list[tuple[tuple[int, ...], int]]
MATRICES: Cases = [((6, 10), 0), ((5, 8), 0), ((9, 4), 0)]
BLOCKS: Cases = [((3, 4, 6), 1), ((2, 6, 4), 1), ((4, 3, 5), 0)]
PAIRS: Cases = [((4, 10), 0), ((7, 4), 0)]  # low_rank
PAIRS += [((2, 4, 6), 1), ((2, 6, 4), 1)]  # block_shuffle
PAIRS += [((3, 2, 4), 0), ((8, 6), 0)]  # block_dense
CASES: dict[str, Cases] = {
    "muon": MATRICES + BLOCKS,
    "spectron": PAIRS,
    "lora_muon": PAIRS[:2],
    "adamw": [((5,), 0), ((6, 3), 0)],
}
"""Rule -> the shape and the sharded dimension of each parameter; not all can be halved."""


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(sharded: bool) -> FactorOptimizer:
    mesh = init_device_mesh("cpu", (2,)) if sharded else None
    groups: list[dict[str, Any]] = []
    for rule, cases in CASES.items():
        parameters = []
        for index, (shape, dim) in enumerate(cases):
            tensor = draw(shape, index)
            if mesh is not None:
                tensor = distribute_tensor(tensor, mesh, [Shard(dim)])
            parameters.append(nn.Parameter(tensor))
        names = [f"{rule}.{index}" for index in range(len(cases))]
        groups.append({"params": parameters, "names": names, "rule": rule})
        if rule != "adamw":  # in bf16 a last bit of the momentum could decide a rounding
            groups[-1]["precision"] = "fp32"
    return FactorOptimizer(groups, lr=0.02)


def held(optimizer: FactorOptimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def train(optimizer: FactorOptimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(held(optimizer)):
            gradient = draw(tuple(parameter.shape), 100 * step + index)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, mesh, placements)
            parameter.grad = gradient
        optimizer.step()


def assert_same(found: FactorOptimizer, wanted: FactorOptimizer) -> None:
    """Up to the last bits, which may depend on where a vectorised loop starts."""
    for mine, theirs in zip(held(found), held(wanted), strict=True):
        torch.testing.assert_close(full(mine), full(theirs), rtol=1e-5, atol=1e-6)


def compare() -> set[str]:
    """Two processes against none, then on from the gathered state, one way and the other."""
    sharded, whole = build(True), build(False)
    train(sharded, range(3))
    train(whole, range(3))
    assert_same(sharded, whole)
    for name, value in optimizer_tensors(sharded):
        assert isinstance(value, DTensor) == name.endswith(("momentum_buffer", "exp_avg", "avg_sq"))
    again = {True: build(True), False: build(False)}
    tensors = {name: full(value) for name, value in optimizer_tensors(sharded)}
    for optimizer in again.values():
        load_optimizer_(optimizer, {name: value.clone() for name, value in tensors.items()})
        train(optimizer, range(3, 5))
    assert_same(again[True], again[False])
    return {str(p.placements) for p in held(sharded) if isinstance(p, DTensor)}


def train_model(kind: str, sharded: bool) -> dict[str, Tensor]:
    """Two steps of a whole model, with pairs of both shapes."""
    model = tiny_model("llama").train()
    factorize_(model, LowRankConfig(rank=8), filter_fn=lambda _, name: "1.mlp" in name)
    factorize_(
        model, BlockDenseConfig(num_blocks=2, rank=8), filter_fn=lambda _, name: "2.mlp" in name
    )
    if sharded:
        fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 3 else None)
    optimizer = build_optimizer(model, kind=kind, learning_rate=1e-2)
    for _ in range(2):
        model(tiny_input_ids(), labels=tiny_input_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def compare_models() -> bool:
    for kind in ("muon", "spectron"):
        found, wanted = train_model(kind, True), train_model(kind, False)
        assert found.keys() == wanted.keys()
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    return dist.get_world_size() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "result"), [(compare, {"(Shard(dim=0),)", "(Shard(dim=1),)"}), (compare_models, True)]
)
def test_two_processes_do_what_one_does(check: Any, result: object) -> None:
    assert run_distributed(check, 2) == [result, result]

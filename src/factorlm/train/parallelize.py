"""How a model uses the machine: recomputed, compiled, sharded, replicated; in that order."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from factorlm.anatomy import decoder_layers
from factorlm.config import check
from factorlm.distributed import World
from factorlm.hf import materialize_
from factorlm.hf.loss import CausalLMLoss
from factorlm.measure import has_fast_bf16
from factorlm.surgery import guided_layers
from factorlm.surgery.guides import hide_guides_from_ddp
from factorlm.train.assemble import build_model
from factorlm.train.config import ParallelSection, TrainConfig
from factorlm.train.recompute import recompute_ffns_


@dataclass(frozen=True)
class Assembled:
    """One model, as it is saved and as it is run."""

    model: PreTrainedModel
    """The causal LM: its parameter names are those of files."""
    loss: CausalLMLoss
    """``model`` with its loss, on this process alone (evaluation)."""
    module: nn.Module
    """``loss`` with the exchange of gradients around it (training)."""


def parallelize_model(config: TrainConfig, world: World, *, guided: bool = False) -> Assembled:
    """Build the recipe's model on this process's device, sharded or replicated as it says;
    ``guided`` puts a guide beside every structured layer.

    The initial weights are equal for every world size and strategy.
    """
    parallel = config.parallel
    sharded = parallel.strategy == "fsdp2"
    check(not sharded or dist.is_initialized(), FSDP2_ALONE)
    on_meta = sharded and config.model.init_from is None
    model, _ = build_model(config, device="meta" if on_meta else world.device, guided=guided)
    model.train()
    prepare_layers(model, parallel)
    loss = CausalLMLoss(model)
    if sharded:
        shard_(loss, world)
        if on_meta:
            materialize_(model, device=world.device, seed=config.seed)
    return Assembled(model, loss, loss if sharded else replicate(loss, world))


FSDP2_ALONE = (
    "parallel.strategy='fsdp2' needs a process group: start it with "
    "torchrun --nproc-per-node N -m factorlm train ..."
)


def prepare_layers(model: PreTrainedModel, parallel: ParallelSection) -> None:
    """Activation checkpointing and per-layer ``compile``, in place; parameter names stay."""
    if parallel.activation_checkpointing == "ffn":
        recompute_ffns_(model)
    elif parallel.activation_checkpointing:
        with warnings.catch_warnings():  # 5.23 announces another name, 5.3 has only this one
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if parallel.compile:
        raise_recompile_limit()
        for layer in decoder_layers(model):
            layer.compile()


def raise_recompile_limit() -> None:
    """Let dynamo keep up to 64 graphs of a function. All decoder layers share one: dense or
    structured, guided or skipped, training or evaluating on whole or partial batches, they need
    more than its 8, past which it runs a layer uncompiled for the rest of the process."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def shard_(module: CausalLMLoss, world: World) -> None:
    """FSDP2 on every guide, every decoder layer and the rest; ``module`` may be on the meta device.

    A guide is a unit of its own, so a step that leaves it out does not gather it."""
    mesh = init_device_mesh(world.device.type, (world.size,))

    def placement(parameter: nn.Parameter) -> Shard | None:
        # Dimension 0 of a block factor (G, ...) is often smaller than the world.
        if parameter.ndim == 3 and parameter.shape[1] % world.size == 0:
            return Shard(1)
        return None

    for guided in guided_layers(module.model).values():
        fully_shard(guided.guide, mesh=mesh)
    for layer in decoder_layers(module.model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(module, mesh=mesh, shard_placement_fn=placement)


def replicate(module: CausalLMLoss, world: World) -> nn.Module:
    """DDP where there are several processes; the guides, which it leaves alone, start equal too,
    also where processors that round differently made them."""
    if world.size == 1:
        return module
    hide_guides_from_ddp(module)
    for layer in guided_layers(module).values():
        dist.broadcast(layer.guide.weight.detach(), 0)
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def gradients_held(module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """No gradient exchange but in the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    elif isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls. ``auto``: bf16 where the processor computes in it, else float32."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device.type) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32

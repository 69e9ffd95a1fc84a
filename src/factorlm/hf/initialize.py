"""Initial weights that are equal for any number of processes, any device and any dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from factorlm.config import check
from factorlm.layers import SelfGuidedLinear, StructuredLinear, saved_name
from factorlm.surgery import initializer_std, restore_buffers_, stock_model


def materialize_(model: PreTrainedModel, *, device: torch.device | str, seed: int) -> None:
    """Allocate a model that was built on the meta device, tie its weights again, initialise it.

    Under ``fully_shard`` every rank allocates and keeps its shards alone.
    """
    model.to_empty(device=device)
    model.tie_weights()
    initialize_(model, seed)


@torch.no_grad()
def initialize_(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter and compute every buffer of ``model`` anew, in place.

    Each module is initialised whole by its own initialiser (its family's ``_init_weights``, a
    structure's ``reset_parameters`` with the family's standard deviation), on the CPU in float32,
    from a generator seeded by ``seed`` and the module's name. Of a ``DTensor`` each rank keeps
    its shard. So the weights do not depend on device, dtype, wrappers or world size.

    Some families set a few tensors in constructors alone; for these the whole model is built once
    more on the CPU of every rank.

    Raises ``ConfigError`` for a tensor that is still on the meta device, or that no initialiser
    sets.
    """
    std = initializer_std(model)
    drawn: set[int] = set()
    unset: dict[str, Tensor] = {}
    for name, module, owner in _children_first(model, "", model):
        if isinstance(module, StructuredLinear):
            _initialize_structured(module, std, seed_of(seed, name), drawn)
        elif isinstance(module, SelfGuidedLinear):
            _initialize_guided(module, std, seed_of(seed, name), drawn)
        else:
            unset |= _initialize_module(module, owner, name, seed_of(seed, name), drawn)
    if unset:
        _copy_constructed(model, seed, unset)


def seed_of(seed: int, name: str) -> int:
    """A seed for one module, from the run's seed and the module's name in the saved model."""
    digest = hashlib.blake2b(f"{seed}/{saved_name(name)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _children_first(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """(name, module, the model whose ``_init_weights`` is in charge), parents after children."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    if not isinstance(module, StructuredLinear | SelfGuidedLinear):
        for key, child in module.named_children():
            yield from _children_first(child, f"{name}.{key}" if name else key, owner)
    yield name, module, owner


def _initialize_structured(
    module: StructuredLinear, std: float | None, seed: int, drawn: set[int]
) -> StructuredLinear:
    """Draw ``module`` and return its unsharded float32 copy."""
    whole = module.config.build(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        device="meta",
        dtype=torch.float32,
    ).to_empty(device="cpu")
    whole.reset_parameters(std=std, generator=torch.Generator().manual_seed(seed))
    for key, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in drawn:
            copy_whole_(parameter, whole.get_parameter(key))
            drawn.add(id(parameter))
    restore_buffers_(module)
    return whole


def _initialize_guided(
    module: SelfGuidedLinear, std: float | None, seed: int, drawn: set[int]
) -> None:
    """The structured layer as it would be drawn alone; its guide is computed from it."""
    whole = _initialize_structured(module.structured, std, seed, drawn)
    copy_whole_(module.guide.weight, whole.to_dense())
    module.set_alpha(1.0)
    drawn.add(id(module.guide.weight))


def _initialize_module(
    module: nn.Module, owner: PreTrainedModel, name: str, seed: int, drawn: set[int]
) -> dict[str, Tensor]:
    """Run ``owner._init_weights`` on a stand-in for ``module``, copy what it set, and return the
    module's own tensors that it did not set, by name.

    Some families set a child's weights from the parent (GPT-2 scales its residual projections).
    A first pass holds descendants on the meta device and finds the ones that are written, a
    second pass draws these too.
    """
    own = {id(tensor) for _, tensor in _tensors(module, recurse=False)}
    stand_in = _run(module, owner, own, seed)
    named = dict(_tensors(module, recurse=True))
    reached = {
        id(named[key])
        for key, tensor in _tensors(stand_in, recurse=True)
        if tensor.is_meta and tensor._version > 0
    }
    if reached:
        stand_in = _run(module, owner, own | reached, seed)
    unset = {}
    for key, value in _tensors(stand_in, recurse=True):
        target = named[key]
        if value.is_meta or (id(target) in drawn and id(target) not in reached):
            continue
        drawn.add(id(target))
        if _is_set(value):
            copy_whole_(target, value)
        else:
            unset[f"{name}.{key}" if name else key] = target
    return unset


def _run(module: nn.Module, owner: PreTrainedModel, real: set[int], seed: int) -> nn.Module:
    stand_in = _stand_in(module, real)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        owner._init_weights(stand_in)
    return stand_in


def _stand_in(module: nn.Module, real: set[int]) -> nn.Module:
    """A copy of ``module`` with tensors of its own: unsharded, float32, on the CPU where their
    ids are in ``real`` and on the meta device elsewhere."""
    parts = {
        "_parameters": {
            key: None if tensor is None else nn.Parameter(_unset(tensor, real), requires_grad=False)
            for key, tensor in module._parameters.items()
        },
        "_buffers": {
            key: None if tensor is None else _unset(tensor, real)
            for key, tensor in module._buffers.items()
        },
        "_modules": {
            key: None if child is None else _stand_in(child, real)
            for key, child in module._modules.items()
        },
    }
    copy: nn.Module = object.__new__(type(module))
    # Not by setattr, which a compiled module hands on to the module that it wraps.
    copy.__dict__.update(module.__dict__ | parts)
    return copy


def _unset(tensor: Tensor, real: set[int]) -> Tensor:
    device = "cpu" if id(tensor) in real else "meta"
    if tensor.is_floating_point():
        return torch.full(tensor.shape, float("nan"), dtype=torch.float32, device=device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _is_set(value: Tensor) -> bool:
    return not bool(value.isnan().any()) if value.is_floating_point() else value._version > 0


def _copy_constructed(model: PreTrainedModel, seed: int, unset: dict[str, Tensor]) -> None:
    """Fill ``unset`` with what the constructors of the model's family give."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed_of(seed, ""))
        constructed = dict(_tensors(stock_model(model).float(), recurse=True))
    for name, target in unset.items():
        saved = saved_name(name)
        check(saved in constructed, f"{name}: nothing in the model's own code initialises it")
        copy_whole_(target, constructed[saved])


def _tensors(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


@torch.no_grad()
def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copy ``source``, whole on every rank, into ``target``, which may be a sharded ``DTensor``."""
    check(not target.is_meta, "the model is on the meta device: allocate it first")
    if not isinstance(target, DTensor):
        target.copy_(source)
        return
    shard = distribute_tensor(
        source.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None
    )
    target.to_local().copy_(shard.to_local())

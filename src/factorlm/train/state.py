"""What a run is at one moment, and its tensors as they go to and come from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from factorlm.config import Config
from factorlm.errors import CheckpointError
from factorlm.layers import saved_name


@dataclass(frozen=True, kw_only=True)
class RunState(Config):
    """Where a run is. Randomness and data order are functions of the seed and the step, so
    nothing else has to be kept besides weights and optimizer state."""

    step: int = 0
    """Optimizer steps that are done."""
    num_tokens: int = 0
    """Tokens trained on."""
    evaluated_step: int = 0
    """The last step whose due evaluation is done."""
    best_loss: float | None = None
    """Lowest validation loss so far, nats per token."""
    train_seconds: float = 0.0
    """Wall time of the steps."""


def seed_step(seed: int, step: int, micro_batch: int) -> None:
    """Seed dropout for one micro-batch, so that it depends on nothing that came before.

    ``micro_batch`` counts over all processes: the draw does not depend on their number.
    """
    place = (seed * 1_000_003 + step) * 65_537 + micro_batch
    torch.manual_seed(place % 2**64)  # all that PyTorch takes


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; gathered from all processes if it is sharded."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def copy_into_(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into ``target``, which may be sharded."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(
            whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.detach().copy_(whole)


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by their saved names, a tied one once, as they are held."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield saved_name(name), tensor


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients hold NaN or infinity."""
    return [
        saved_name(name)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(full(parameter.grad)).all())
    ]


def load_model_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the model; every name, shape and dtype has to agree."""
    own = dict(model_tensors(model))
    _check_same("model", own, tensors)
    with torch.no_grad():
        for name, target in own.items():
            copy_into_(target, tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state as tensors named ``<parameter>|<key>``."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}|{key}", value if isinstance(value, Tensor) else torch.tensor(value)


def load_optimizer_(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the state of every parameter from what ``optimizer_tensors`` gave."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        by_name.setdefault(name, {})[key] = tensor
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name not in by_name:
                raise CheckpointError(f"the optimizer state of '{name}' is missing")
            state = {k: _like(parameter, value) for k, value in by_name.pop(name).items()}
            optimizer.state[parameter] = state
    if by_name:
        raise CheckpointError(f"optimizer state of unknown parameters: {sorted(by_name)}")


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` on the parameter's device, sharded as it is where it has its shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    moment = torch.empty_like(parameter, dtype=value.dtype).detach()
    copy_into_(moment, value)
    return moment


def _check_same(what: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in own.keys() - found.keys()]
    problems += [f"unknown {name}" for name in found.keys() - own.keys()]
    for name in own.keys() & found.keys():
        mine, theirs = own[name], found[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            problems.append(
                f"{name} is {tuple(theirs.shape)} {theirs.dtype}, "
                f"not {tuple(mine.shape)} {mine.dtype}"
            )
    if problems:
        raise CheckpointError(f"{what} does not fit: " + "; ".join(sorted(problems)[:20]))

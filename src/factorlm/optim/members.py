"""The parameters of a model by what an optimizer has to know of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from factorlm.anatomy import LinearModule, anatomy_of, is_linear
from factorlm.layers import StructuredLinear
from factorlm.layers.self_guided import Guide
from factorlm.layers.wrapper import saved_name
from factorlm.optim.multipliers import factor_multipliers

Role = Literal["pair", "matrix", "guide", "other"]
"""``pair``: one of the two factors of a structured linear in a decoder layer; ``matrix``: another
weight of attention or FFN, dense or a factor; ``guide``: the dense weight of a guide; ``other``:
all else, such as embeddings, the head, norms, biases, routers and the fused weights of experts.
In a model without decoder layers every structured linear counts as if it were in one."""


@dataclass(frozen=True)
class Member:
    """A trainable parameter."""

    name: str
    """As files have it: ``saved_name``."""
    parameter: nn.Parameter
    role: Role
    multiplier: float
    """``factor_multipliers``; 1 for what is not a factor."""


@dataclass(frozen=True)
class _Unit:
    """Parameters that an optimizer must not part."""

    role: Role
    parameters: tuple[nn.Parameter, ...]
    multipliers: tuple[float, ...] = (1.0,)


def members(model: nn.Module) -> list[Member]:
    """Every trainable parameter of ``model`` once, by its first name and in the model's order.

    The two factors of a pair stand side by side, in order of application. On any device.
    """
    names = {id(parameter): saved_name(name) for name, parameter in model.named_parameters()}
    units = _units(model)
    found: dict[int, Member] = {}
    for parameter in model.parameters():
        unit = units.get(id(parameter), _Unit("other", (parameter,)))
        for part, multiplier in zip(unit.parameters, unit.multipliers, strict=True):
            if part.requires_grad:
                member = Member(names[id(part)], part, unit.role, multiplier)
                found.setdefault(id(part), member)
    return list(found.values())


def _units(model: nn.Module) -> dict[int, _Unit]:
    """Hidden weights and guides, by the ids of their parameters."""
    units: dict[int, _Unit] = {}
    for module in _hidden_linears(model):
        parameters, multipliers = _weights(module)
        # A frozen factor, or one that another layer has too, has no partner.
        free = all(p.requires_grad and id(p) not in units for p in parameters)
        if isinstance(module, StructuredLinear) and len(parameters) == 2 and free:
            pair = _Unit("pair", parameters, multipliers)
            units |= {id(parameter): pair for parameter in parameters}
        for parameter, multiplier in zip(parameters, multipliers, strict=True):
            units.setdefault(id(parameter), _Unit("matrix", (parameter,), (multiplier,)))
    for module in model.modules():
        if isinstance(module, Guide):
            units[id(module.weight)] = _Unit("guide", (module.weight,))
    return units


def _hidden_linears(model: nn.Module) -> Iterator[LinearModule]:
    """The linears of attention and FFN inside the decoder layers, or else all structured ones."""
    anatomy = anatomy_of(model)
    if not anatomy.decoder_layers:
        yield from (module for module in model.modules() if isinstance(module, StructuredLinear))
    for site in (*anatomy.attention_linears, *anatomy.ffn_linears):
        for module in model.get_submodule(site.name).modules():
            if is_linear(module):
                yield module


def _weights(module: LinearModule) -> tuple[tuple[nn.Parameter, ...], tuple[float, ...]]:
    """The weight, or the factors in order of application, and their multipliers."""
    if not isinstance(module, StructuredLinear):
        return (module.get_parameter("weight"),), (1.0,)
    parameters = tuple(module.get_parameter(factor.name) for factor in module.factors)
    sizes = module.in_features, module.out_features
    return parameters, factor_multipliers(module.config, *sizes)

"""The parts of a causal language model: decoder layers, attention, FFN, embeddings, head, norms.

Nothing here knows a family by name. Three facts of the model's own structure decide:

* the decoder layers are the largest outermost ``nn.ModuleList`` whose blocks mix tokens;
* a module mixes tokens (attention, state-space mixers, convolutions over time) if its ``forward``
  asks for a mask, a position or a cache, which a layer that sees each token alone cannot use;
* beside experts, a submodule whose linears do not write back the width that they read is a router.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from factorlm.anatomy.linears import (
    LinearModule,
    is_linear,
    linear_kind,
    linear_num_params,
    linear_sizes,
)

_SEQUENCE_ARGUMENT = re.compile(r"mask|past|cache|position|alibi")


@dataclass(frozen=True)
class LinearSite:
    """A linear layer and where it is."""

    name: str
    """The module's name in the model it was read from."""
    layer_index: int
    """Which decoder layer holds it, from 0."""
    in_features: int
    out_features: int
    kind: str
    """``linear``, ``conv1d``, or the registered name of a structure."""
    bias: bool
    num_params: int
    """Weights as they are kept now, without bias."""


@dataclass(frozen=True)
class TensorSite:
    """A parameter that no module swap can reach, such as the fused weights of experts."""

    name: str
    layer_index: int
    shape: tuple[int, ...]
    num_params: int


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, by module names. Shared modules are listed once."""

    decoder_layers: tuple[str, ...]
    attention: tuple[str, ...]
    """Every module that mixes tokens inside a decoder layer."""
    attention_linears: tuple[LinearSite, ...]
    ffn_linears: tuple[LinearSite, ...]
    """Linears of the decoder layers outside attention; routers are left out."""
    routers: tuple[LinearSite, ...]
    experts: tuple[TensorSite, ...]
    """Parameters of three or more dimensions outside attention."""
    input_embedding: str | None
    other_embeddings: tuple[str, ...]
    """Learned positions and the like."""
    head: str | None
    """None for a base model."""
    tied: bool
    """The head's weight is the input embedding itself."""
    norms: tuple[str, ...]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Read ``model``: a causal language model or its base model, on any device, meta included.

    Structured layers count as the linears that they replaced. A part that is not there is empty:
    a model without decoder layers gives an ``Anatomy`` without them, not an error.
    """
    names = module_names(model)
    blocks = decoder_layers(model)
    attention: list[nn.Module] = []
    attention_linears: list[LinearSite] = []
    ffn: list[LinearSite] = []
    routers: list[LinearSite] = []
    experts: list[TensorSite] = []
    for index, block in enumerate(blocks):
        mixers = list(_mixers(block))
        inside = {id(module) for mixer in mixers for module in mixer.modules()}
        skip = _router_linears(block, inside)
        attention += mixers
        for module in _linears(block):
            group = attention_linears if id(module) in inside else ffn
            group = routers if id(module) in skip else group
            group.append(_site(names[id(module)], index, module))
        experts += _experts(block, index, inside, names)
    embeddings = _embeddings(model, blocks)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return Anatomy(
        decoder_layers=_distinct(names[id(block)] for block in blocks),
        attention=_distinct(names[id(mixer)] for mixer in attention),
        attention_linears=_distinct_sites(attention_linears),
        ffn_linears=_distinct_sites(ffn),
        routers=_distinct_sites(routers),
        experts=tuple({site.name: site for site in experts}.values()),
        input_embedding=None if not embeddings else names[id(embeddings[0])],
        other_embeddings=tuple(names[id(module)] for module in embeddings[1:]),
        head=None if head is None else names[id(head)],
        tied=_tied(head, embeddings),
        norms=tuple(name for name, module in model.named_modules() if _is_norm(module)),
    )


def module_names(model: nn.Module) -> dict[int, str]:
    """``id(module) -> name``; a shared module has the first of its names."""
    return {id(module): name for name, module in model.named_modules()}


@cache
def _mixes_tokens(forward: Callable[..., Any]) -> bool:
    arguments = inspect.signature(forward).parameters
    return any(_SEQUENCE_ARGUMENT.search(name) for name in arguments)


def _mixers(block: nn.Module) -> Iterator[nn.Module]:
    """The outermost submodules of a decoder layer that mix tokens."""
    for child in block.children():
        if _mixes_tokens(type(child).forward):
            yield child
        else:
            yield from _mixers(child)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in order of application; empty if there are none."""
    stacks = list(_stacks(model))
    sizes = [sum(parameter.numel() for parameter in stack.parameters()) for stack in stacks]
    return list(stacks[sizes.index(max(sizes))]) if stacks else []


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Outermost lists of blocks in which some block mixes tokens."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and any(any(_mixers(block)) for block in child):
            yield child
        else:
            yield from _stacks(child)


def _linears(module: nn.Module) -> Iterator[LinearModule]:
    """Outermost linear layers, in the order of their names."""
    if is_linear(module):
        yield module
        return
    for child in module.children():
        yield from _linears(child)


def _site(name: str, layer_index: int, module: LinearModule) -> LinearSite:
    in_features, out_features = linear_sizes(module)
    return LinearSite(
        name=name,
        layer_index=layer_index,
        in_features=in_features,
        out_features=out_features,
        kind=linear_kind(module),
        bias=module.bias is not None,
        num_params=linear_num_params(module),
    )


def _router_linears(block: nn.Module, attention: set[int]) -> set[int]:
    """Ids of the linears that choose among experts, or weigh them."""
    found: set[int] = set()
    for module in block.modules():
        if id(module) in attention or not _holds_experts(module, attention):
            continue
        for child in module.children():
            linears = [linear for linear in _linears(child) if id(linear) not in attention]
            written = {linear_sizes(linear)[1] for linear in linears}
            if linears and linear_sizes(linears[0])[0] not in written:
                found |= {id(linear) for linear in linears}
    return found


def _holds_experts(module: nn.Module, attention: set[int]) -> bool:
    """Whether a direct child is a set of experts: fused in 3-D parameters, or a list of FFNs."""
    for child in module.children():
        if id(child) in attention or isinstance(child, _ConvNd):
            continue
        fused = any(parameter.dim() >= 3 for parameter in child.parameters(recurse=False))
        listed = isinstance(child, nn.ModuleList) and all(
            any(_linears(expert)) and not is_linear(expert) for expert in child
        )
        if (fused and not is_linear(child)) or listed:
            return True
    return False


def _experts(
    block: nn.Module, index: int, attention: set[int], names: dict[int, str]
) -> Iterator[TensorSite]:
    for module in block.modules():
        if id(module) in attention or is_linear(module) or isinstance(module, _ConvNd):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 3:
                name = f"{names[id(module)]}.{key}"
                yield TensorSite(name, index, tuple(parameter.shape), parameter.numel())


def _embeddings(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Embedding tables outside the decoder layers, the one of the tokens first."""
    inside = {id(module) for block in blocks for module in block.modules()}
    tables: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and id(module) not in inside
    ]
    tokens = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if tokens is None:
        return tables
    return [tokens, *(table for table in tables if table is not tokens)]


def _tied(head: nn.Module | None, embeddings: list[nn.Module]) -> bool:
    if head is None or not embeddings:
        return False
    table = {id(parameter) for parameter in embeddings[0].parameters()}
    return any(id(parameter) in table for parameter in head.parameters())


def _is_norm(module: nn.Module) -> bool:
    """A leaf that scales features: at least one parameter, none with more than one dimension."""
    parameters = list(module.parameters(recurse=False))
    leaf = not any(True for _ in module.children())
    return leaf and bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)


def _distinct(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _distinct_sites(sites: list[LinearSite]) -> tuple[LinearSite, ...]:
    return tuple({site.name: site for site in reversed(sites)}.values())[::-1]

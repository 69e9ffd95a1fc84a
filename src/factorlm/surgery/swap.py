"""``factorize_`` and its inverse ``densify_``: they swap linear layers of a model in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factorlm.anatomy import (
    LinearModule,
    anatomy_of,
    dense_bias,
    dense_weight,
    linear_kind,
    linear_num_params,
    linear_sizes,
)
from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.layers import (
    PreMergedLinear,
    SelfGuidedLinear,
    StructureConfig,
    StructuredLinear,
    saved_name,
)
from factorlm.layers.base import alike_, check_finite
from factorlm.surgery.block import QUANT_METHOD, write_block
from factorlm.surgery.report import SwapReport, SwapRow
from factorlm.surgery.targets import FilterFn, StructureMap, choose, solve

Weights = Literal["project", "reset", "empty"]


def factorize_(
    model: nn.Module,
    config: StructureConfig | StructureMap,
    *,
    filter_fn: FilterFn | None = None,
    weights: Weights = "project",
    param_ratio: float | None = None,
    multiple_of: int | None = None,
    keep_first_dense: bool = True,
) -> SwapReport:
    """Replace linear layers of ``model`` by structured ones, in place, and say what was done.

    By default these are the linears of the FFN of every decoder layer but the first, whatever
    the family. A ``filter_fn(module, name)`` or a ``StructureMap`` replaces that choice
    altogether, ``keep_first_dense`` included. A module that several parents share is replaced
    once for all; embeddings and weights that are tied are never touched.

    Args:
        weights: ``"project"``, the best approximation of the weights that are there; ``"reset"``,
            a fresh draw with the standard deviation of the model's ``initializer_range``;
            ``"empty"``, left to be loaded or initialised. On the meta device all are ``"empty"``.
        param_ratio: the share of the dense weight's parameters that each structure solves its
            free size for.
        multiple_of: what that size is a multiple of; None takes ``default_multiple``.

    The model's config gets a ``quantization_config`` block, by which the saved model is built
    again; so does that of every Hugging Face model inside ``model``. Raises, before anything is
    changed, ``ConfigError`` if nothing matches or sizes do not fit, and ``NumericError`` for
    weights to approximate that are not finite.
    """
    check(
        isinstance(config, StructureConfig | StructureMap),
        f"config={config!r} must be a StructureConfig, such as LowRankConfig(rank=64), or a "
        "StructureMap",
    )
    known = get_args(Weights)
    check(weights in known, f"weights={weights!r} must be one of {known}")
    check(
        multiple_of is None or param_ratio is not None,
        f"multiple_of={multiple_of} rounds a size that is solved: it needs param_ratio",
    )
    _check_block(model)
    chosen = choose(model, config, filter_fn, keep_first_dense)
    check("" not in chosen, f"the model itself is a {type(model).__name__}: use from_linear")
    modules = {name: _linear(model, name) for name in chosen}
    configs = {
        name: _solve(name, chosen[name], module, param_ratio, multiple_of)
        for name, module in modules.items()
    }
    if weights == "project":
        _check_finite(modules)
    stds = _initializer_stds(model)
    rows = []
    for name, module in modules.items():
        layer = _structured(module, configs[name], weights, stds.get(id(module)))
        rows.append(_row(name, module, layer))
        replace_everywhere(model, module, layer)
    update_block(model)
    return SwapReport(tuple(rows), anatomy_of(model).experts)


def densify_(model: nn.Module) -> SwapReport:
    """Replace every structured layer by a dense one with the same weight, in place.

    The dense layer is of the class that the model's family has there (GPT-2's ``Conv1D``, ...),
    so that ``save_pretrained`` then writes a stock checkpoint. Removes the
    ``quantization_config`` block. Raises ``ConfigError`` if there is no structured layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }
    check(bool(layers), f"{type(model).__name__} has no structured layer")
    check("" not in layers, f"the model itself is a {type(model).__name__}: use to_linear")
    guided = any(isinstance(module, SelfGuidedLinear) for module in model.modules())
    check(not guided, f"{type(model).__name__} has guides attached: detach_guides_ first")
    check_not_premerged(model)
    stock = _stock_layers(model)
    rows = []
    for name, layer in layers.items():
        linear = layer.to_linear()
        dense = _as_stock(linear, stock[id(layer)]) if id(layer) in stock else linear
        rows.append(_row(name, layer, dense))
        replace_everywhere(model, layer, dense)
    update_block(model)
    return SwapReport(tuple(rows), anatomy_of(model).experts)


def hugging_face_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The Hugging Face models in ``model``, the outermost ones: itself, or those that a wrapper
    or a module of the user's holds."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from hugging_face_models(child)


def initializer_std(model: PreTrainedModel) -> float | None:
    """The standard deviation that the model's family draws its weights with, None if unstated."""
    fields = model.config.get_text_config().to_dict()
    return fields.get("initializer_range") or fields.get("init_std")


def _initializer_stds(model: nn.Module) -> dict[int, float | None]:
    """Id of every module of a Hugging Face model -> the ``initializer_std`` of that model."""
    return {
        id(module): initializer_std(inner)
        for inner in hugging_face_models(model)
        for module in inner.modules()
    }


def _stock_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Id of every structured layer of a Hugging Face model -> what its family has, on meta."""
    found = {}
    for inner in hugging_face_models(model):
        with torch.device("meta"):
            stock = stock_model(inner)
        for name, module in inner.named_modules():
            if isinstance(module, StructuredLinear):
                found[id(module)] = stock.get_submodule(name)
    return found


def _check_finite(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            check_finite(f"{name}.{key}", parameter)


def _linear(model: nn.Module, name: str) -> LinearModule:
    module: LinearModule = model.get_submodule(name)
    return module


def _solve(
    name: str,
    config: StructureConfig,
    module: LinearModule,
    param_ratio: float | None,
    multiple_of: int | None,
) -> StructureConfig:
    try:
        return solve(config, module, param_ratio, multiple_of)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


@torch.no_grad()
def _structured(
    module: LinearModule, config: StructureConfig, weights: Weights, std: float | None
) -> StructuredLinear:
    """A structured layer in the place of ``module``: same sizes, bias, device, dtype, mode, and
    trainable where ``module`` is."""
    parameter = next(module.parameters())
    bias = dense_bias(module)
    layer = _empty_layer(config, module, device=parameter.device, dtype=parameter.dtype)
    if weights == "reset":
        layer.reset_parameters(std=std)
    elif weights == "project" and not parameter.is_meta:
        layer.project_(dense_weight(module))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    return alike_(layer, module)


def _empty_layer(
    config: StructureConfig, like: LinearModule, *, device: torch.device, dtype: torch.dtype
) -> StructuredLinear:
    """The structured layer that replaces ``like``, its parameters allocated and not drawn."""
    sizes = linear_sizes(like)
    bias = dense_bias(like) is not None
    layer = config.build(*sizes, bias=bias, device="meta", dtype=dtype)
    if device.type == "meta":
        return layer
    return restore_buffers_(layer.to_empty(device=device))


def restore_buffers_(layer: StructuredLinear) -> StructuredLinear:
    """Compute anew the buffers that no file holds: ``to_empty`` and loading leave them garbage."""
    if layer._non_persistent_buffers_set:
        built = layer.config.build(layer.in_features, layer.out_features, bias=False)
        for name in layer._non_persistent_buffers_set:
            layer.get_buffer(name).copy_(built.get_buffer(name))
    return layer


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is, for every parent that holds it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def check_not_premerged(model: nn.Module) -> None:
    """Raise ``ConfigError`` if structured layers of ``model`` keep merged or packed copies."""
    kept = [module for module in model.modules() if isinstance(module, PreMergedLinear)]
    merged = any(layer.policy.ever_merges for layer in kept)
    check(not merged, f"{type(model).__name__} has merged copies: unpremerge_ first")
    check(not kept, f"{type(model).__name__} has packed copies: unpack_ first")


def _row(name: str, before: LinearModule, after: LinearModule) -> SwapRow:
    in_features, out_features = linear_sizes(before)
    return SwapRow(
        name=name,
        in_features=in_features,
        out_features=out_features,
        before_kind=linear_kind(before),
        after_kind=linear_kind(after),
        before_params=linear_num_params(before),
        after_params=linear_num_params(after),
    )


def _check_block(model: nn.Module) -> None:
    for inner in hugging_face_models(model):
        block = inner.config.to_dict().get("quantization_config") or {}
        method = block.get("quant_method")
        check(
            method in (None, QUANT_METHOD),
            f"quantization_config.quant_method={method!r}: only full-precision weights are swapped",
        )


def update_block(model: nn.Module) -> None:
    """Write the ``quantization_config`` block for the structured layers that ``model``, or a
    Hugging Face model inside it, has; remove it where there are none."""
    for inner in hugging_face_models(model):
        _update_own_block(inner)


def _update_own_block(model: PreTrainedModel) -> None:
    layers = {
        saved_name(name): module.config
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }
    if layers:
        model.config.quantization_config = write_block(layers)
        return
    model.config.__dict__.pop("quantization_config", None)
    for key in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(key, None)


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture as its family builds it, dense, on the current default device."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    built: PreTrainedModel = type(model)(config)
    return built


@torch.no_grad()
def _as_stock(dense: nn.Linear, stock: nn.Module) -> LinearModule:
    """``dense`` as the class that ``stock`` (on the meta device) has, with its layout."""
    layer: LinearModule = copy.deepcopy(stock)
    layer.to(dense.weight.dtype).to_empty(device=dense.weight.device)
    layer.weight.copy_(dense.weight.T if isinstance(layer, Conv1D) else dense.weight)
    if dense.bias is not None and layer.bias is not None:
        layer.bias.copy_(dense.bias)
    return alike_(layer, dense)

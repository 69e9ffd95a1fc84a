"""``attach_guides_`` and its inverse ``detach_guides_``: dense guides beside structured layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.layers import StructuredLinear
from factorlm.layers.self_guided import GuideForm, SelfGuidedLinear
from factorlm.optim import GuideSchedule
from factorlm.surgery.swap import check_not_premerged, hugging_face_models, replace_everywhere

IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks up what a model leaves out of it."""


def guided_layers(model: nn.Module) -> dict[str, SelfGuidedLinear]:
    """The layers of ``model`` that have a guide, by name; a shared one once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SelfGuidedLinear)
    }


def hide_guides_from_ddp(model: nn.Module) -> None:
    """Make DDP, which is to wrap ``model``, leave the guides alone: neither broadcast nor reduced,
    as what the model itself leaves out (``IGNORED_BY_DDP``)."""
    names = [f"{name}.{own}" for name in guided_layers(model) for own in ("guide.weight", "alpha")]
    names += vars(model).get(IGNORED_BY_DDP, [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def attach_guides_(model: nn.Module, *, form: GuideForm = "auto") -> list[str]:
    """Put a dense guide beside every structured layer of ``model``, in place; their names.

    Each guide starts equal to its layer's map (on the meta device ``materialize_`` starts it).
    ``form`` is that of ``SelfGuidedLinear``. While guides are there ``save_pretrained`` refuses.
    Raises ``ConfigError`` if there is no structured layer, or if there are guides or merged copies
    already.
    """
    check(not guided_layers(model), f"{type(model).__name__} has guides already")
    check_not_premerged(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }
    check(bool(layers), f"{type(model).__name__} has no structured layer to guide")
    check("" not in layers, "the model itself is the layer: use SelfGuidedLinear")
    for layer in layers.values():
        replace_everywhere(model, layer, SelfGuidedLinear(layer, form=form))
    for inner in hugging_face_models(model):
        inner.__dict__["save_pretrained"] = _refuse_to_save
    return list(layers)


def set_guides_(
    layers: Iterable[SelfGuidedLinear], schedule: GuideSchedule, step: int
) -> tuple[float, bool]:
    """Set the α of ``layers`` for ``step`` (0-based); α, and whether the step leaves guides out."""
    alpha, skipped = schedule.alpha_at(step), not schedule.is_guided(step)
    for layer in layers:
        layer.set_alpha(alpha, skipped=skipped)
    return alpha, skipped


def detach_guides_(model: nn.Module) -> list[nn.Parameter]:
    """Take all guides off, in place, and return their weights: an optimizer has to forget them
    (``factorlm.optim.release_``). What is left has no trace of them."""
    layers = guided_layers(model)
    for layer in layers.values():
        replace_everywhere(model, layer, layer.structured)
    for inner in hugging_face_models(model):
        inner.__dict__.pop("save_pretrained", None)
    return [layer.guide.weight for layer in layers.values()]


def _refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    """Stands in for ``save_pretrained``."""
    raise ConfigError(
        "the model has guides attached, which no saved model holds: train on until they are gone, "
        "or take them off with detach_guides_"
    )

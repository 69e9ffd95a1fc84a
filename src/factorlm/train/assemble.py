"""From a recipe to its model: what ``describe`` counts is what training builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from factorlm.config import check
from factorlm.errors import ConfigError, did_you_mean
from factorlm.hf import build_causal_lm, load, materialize_
from factorlm.layers import STRUCTURES
from factorlm.surgery import SwapReport, attach_guides_, factorize_, read_structure
from factorlm.train.config import ModelSection, TrainConfig

_OPTIONS: Mapping[str, type] = {
    "structure": str,
    "version": int,
    "layers": dict,
    "param_ratio": float,
    "multiple_of": int,
    "keep_first_dense": bool,
}
"""Keys of a recipe's ``structure`` section beside a structure's own fields."""


def build_model(
    config: TrainConfig, *, device: torch.device | str = "meta", guided: bool = False
) -> tuple[PreTrainedModel, SwapReport | None]:
    """The model of a recipe, float32, and what was swapped in it (None for a dense one);
    ``guided`` puts a guide beside every structured layer.

    On the meta device nothing is allocated, and ``model.init_from`` gives its architecture alone.
    Elsewhere a preset is initialised from ``config.seed``; the weights of ``init_from`` are
    loaded, and projected where ``structure`` asks for it. Raises ``ConfigError`` naming the
    section.
    """
    loads = config.model.init_from is not None and torch.device(device).type != "meta"
    with _errors_name("model"):
        model = _load(config.model) if loads else _skeleton(config.model)
        _check_length(model, config.data.context_length)
    report = structure_model_(model, config.structure, project=loads)
    if guided:
        attach_guides_(model, form=config.guide.form)
    if not loads and torch.device(device).type != "meta":
        materialize_(model, device=device, seed=config.seed)
    return model.to(device), report


def structure_model_(
    model: PreTrainedModel, section: Mapping[str, Any], *, project: bool = False
) -> SwapReport | None:
    """Do in place what a recipe's ``structure`` section says; None where it is empty.

    ``project``: factors approximate the weights that are there; else they are left to be
    initialised.
    """
    with _errors_name("structure"):
        _check_section(section)
        arguments = read_structure(section)
        structure = arguments.pop("structure")
        if structure is None:
            return None
        block = model.config.to_dict().get("quantization_config")
        check(block is None, "the model is structured already: leave this section out")
        return factorize_(model, structure, weights="project" if project else "empty", **arguments)


def _skeleton(section: ModelSection) -> PreTrainedModel:
    """The architecture on the meta device."""
    if section.init_from is not None:
        return build_causal_lm(section.init_from, device="meta", **section.overrides)
    assert section.preset is not None
    overrides = {"vocab_size": section.vocab_size} | section.overrides
    return build_causal_lm(section.preset, device="meta", **overrides)


def _load(section: ModelSection) -> PreTrainedModel:
    assert section.init_from is not None
    check(
        not section.overrides,
        f"model.overrides={section.overrides} cannot change the architecture of model.init_from",
    )
    return load(section.init_from, dtype=torch.float32)


def _check_length(model: PreTrainedModel, context_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check(
        limit is None or context_length <= limit,
        f"data.context_length={context_length} exceeds "
        f"model.overrides.max_position_embeddings={limit}",
    )


def _check_section(section: Mapping[str, Any]) -> None:
    """Refuse keys and types that the section cannot have, naming the nearest key that it can."""
    kind = section.get("structure")
    if section and (kind is not None or "layers" not in section):
        known_kinds = ", ".join(STRUCTURES)
        check(isinstance(kind, str), f"structure.structure={kind!r} must name one of {known_kinds}")
        STRUCTURES[str(kind)]  # raises for a name that is not known
    known = {*_OPTIONS, *(() if kind is None else STRUCTURES[kind].__dataclass_fields__)}
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"unknown key 'structure.{key}'.{did_you_mean(key, known)}")
        if value is not None and key in _OPTIONS:
            _check_type(key, value, _OPTIONS[key])


def _check_type(key: str, value: object, expected: type) -> None:
    """``value`` is of type ``expected``; an int is a float too, but a bool is no number."""
    accepted = (int, float) if expected is float else expected
    fits = isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))
    check(fits, f"structure.{key}={value!r} must be of type {expected.__name__}")


@contextmanager
def _errors_name(section: str) -> Iterator[None]:
    """Errors inside name the recipe's section, where they do not yet."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        named = f"{section}." in message or "data." in message
        raise ConfigError(message if named else f"{section}: {message}") from None

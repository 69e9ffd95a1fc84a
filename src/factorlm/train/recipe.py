"""Recipe files: YAML with ``extends:``, read strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.train.config import TrainConfig


class _StrictLoader(yaml.SafeLoader):
    """Refuses a mapping with a repeated key, of which YAML's own loader keeps the last alone."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, before ``<<`` brings other keys in."""
        node = super().compose_mapping_node(anchor)
        seen: list[object] = []
        for key, _ in node.value:
            line = key.start_mark.line + 1
            check(key.value not in seen, f"line {line}: repeats the key {key.value!r}")
            seen.append(key.value)
        return node


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe with the recipes that it extends, then apply ``--section.key value`` flags.

    ``extends: other.yaml`` names a recipe relative to this file; what this file states wins, key
    by key. A recipe without ``name`` is named after its file. Raises ``ConfigError`` naming the
    file and the field.
    """
    path = Path(path)
    values = {"name": path.stem} | read_sections(path)
    try:
        return TrainConfig.from_dict(values, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_sections(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a recipe and those that it extends (not ``children`` again) state, nothing resolved.
    Raises ``ConfigError``."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: extends={path.name!r} extends itself")
    values = read_mapping(path, "recipe")
    base = values.pop("extends", None)
    if base is None:
        return values
    check(isinstance(base, str), f"{path}: extends={base!r} must name one recipe file")
    inherited = read_sections(path.parent / base, (*children, path.resolve()))
    inherited.pop("name", None)
    return merge_sections(inherited, values)


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """A YAML file that is one mapping. Raises ``ConfigError`` with ``kind``, path and line."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{kind} {path}, {error}") from None
    except OSError as error:
        raise ConfigError(f"{kind} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{kind} {path} is not YAML: {error}") from None
    check(isinstance(values, dict), f"{kind} {path} must be a mapping of sections")
    return dict(values)


def merge_sections(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, section by section.

    A changed ``structure.structure`` starts its section anew: fields of one kind mean nothing to
    another.
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        other_kind = key == "structure" and isinstance(value, dict) and "structure" in value
        nested = isinstance(old, dict) and isinstance(value, dict) and not other_kind
        merged[key] = merge_sections(old, value) if nested else value  # type: ignore[arg-type]
    return merged

"""The fields of a config as text for ``--help``, from its types and field docstrings."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from typing import Any

WIDTH = 88


def fields_help(config: type[Any]) -> str:
    """Every field of a config class as the flag that changes it, with type, default and meaning."""
    return "\n".join(_lines(config, ""))


def _lines(config: type[Any], prefix: str) -> Iterator[str]:
    """Plain fields first, then the sections."""
    meanings = _meanings(config)
    sections: list[dataclasses.Field[Any]] = []
    for field in dataclasses.fields(config):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(
            field.default_factory
        ):
            sections.append(field)
            continue
        yield f"  --{prefix}{field.name}  {_type(field)}{_default(field)}"
        if field.name in meanings:
            yield textwrap.fill(
                meanings[field.name], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    for section in sections:
        kind: Any = section.default_factory
        yield f"\n{prefix}{section.name}: {_summary(kind)}"
        yield from _lines(kind, f"{prefix}{section.name}.")


def _meanings(config: type[Any]) -> dict[str, str]:
    """Field name -> the docstring under it."""
    from docstring_parser import parse_from_object

    params = parse_from_object(config).params
    return {param.arg_name: _plain(param.description) for param in params if param.description}


def _summary(config: type[Any]) -> str:
    return _plain((config.__doc__ or "").split("\n\n")[0])


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "")


def _type(field: dataclasses.Field[Any]) -> str:
    """The annotation in the words of YAML: ``cosine | wsd``, ``int | null``."""
    text = str(field.type)
    if text.startswith("Literal["):
        text = " | ".join(item.strip(" \"'") for item in text[8:-1].split(","))
    return text.replace("None", "null").replace("dict[str, Any]", "mapping")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return " (required)"
    plain = isinstance(value, str) and value.isidentifier()
    return f" = {value if plain else json.dumps(value)}"

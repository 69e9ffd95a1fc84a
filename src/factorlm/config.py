"""Frozen, keyword-only configs that read strictly and write as plain JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from factorlm.errors import ConfigError, did_you_mean

C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every config. Subclasses are frozen dataclasses that check in ``__post_init__``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; ``from_dict`` reads it back."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build from plain values, then ``--key value`` overrides.

        Raises ``ConfigError`` for an unknown key (with the nearest known one), a wrong type, or a
        value that the config's own rules refuse.
        """
        return parse(cls, values, overrides)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def plain(value: Any) -> Any:
    """Turn tuples into lists and keep only JSON types, recursively."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def check(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def field_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a config class, nested ones included."""
    names = []
    for field in dataclasses.fields(cls):
        names.append(prefix + field.name)
        default = field.default_factory
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            names += field_names(default, prefix + field.name + ".")
    return names


def parse(cls: type[C], values: Mapping[str, Any], overrides: Sequence[str] = ()) -> C:
    """Strict reading by jsonargparse, with the errors of factorlm."""
    from jsonargparse import ArgumentError, ArgumentParser

    _refuse(cls, values, field_names(cls))
    parser = ArgumentParser(exit_on_error=False, prog="factorlm", allow_abbrev=False)
    parser.add_class_arguments(cls)
    try:
        namespace = parser.parse_object(dict(values))
        if overrides:
            namespace = parser.parse_args(list(overrides), namespace=namespace)
        return cls(**vars(parser.instantiate(namespace)))
    except ConfigError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        cause = error.__context__
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError(_explain(str(error), cls)) from None


def _refuse(cls: type, values: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    """Raise for what jsonargparse passes over: sections that are unknown and empty, and nulls."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        name, field = f"{prefix}{key}", fields.get(key)
        if field is None:
            if isinstance(value, Mapping):
                raise ConfigError(f"unknown key '{name}'.{did_you_mean(name, known)}")
        elif value is None and not re.search("None|Any", str(field.type)):
            raise ConfigError(f"{name}=None must have a value; leave it out for the default")
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(field.default_factory):
            _refuse(field.default_factory, value, known, f"{name}.")


def _explain(message: str, cls: type) -> str:
    """Shorten jsonargparse's message and add the nearest known key to an unknown one."""
    known = field_names(cls)
    found = re.search(
        r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"
        r"|Option '(?P<option>[^']+)' is not accepted"
        r"|unrecognized arguments: --(?P<flag>[^\s=]+)",
        message,
    )
    if not found:
        return " ".join(message.split())
    group = found["group"]
    name = f"{group}.{found['key']}" if group else (found["option"] or found["flag"])
    head = name.split(".")[0]
    if not group and head not in {item.split(".")[0] for item in known}:
        name = head if found["option"] else name
    return f"unknown key '{name}'.{did_you_mean(name, known)}"

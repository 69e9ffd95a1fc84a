"""The kinds of optimizer that ``build_optimizer`` makes: which rule updates which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from factorlm.errors import ConfigError, did_you_mean
from factorlm.optim.members import Role
from factorlm.registry import Registry


@dataclass(frozen=True)
class Kind:
    """A rule of ``factorlm.optim.rule.RULES`` for each role."""

    rules: Mapping[Role, str]

    @property
    def is_adamw(self) -> bool:
        """Whether one rule, AdamW, updates everything."""
        return set(self.rules.values()) == {"adamw"}


def kind_named(name: str) -> Kind:
    """The kind registered as ``name``. Raises ``ConfigError`` for an unknown one."""
    if name not in KINDS:
        raise ConfigError(
            f"optimizer.kind={name!r} must be one of {', '.join(KINDS)}.{did_you_mean(name, KINDS)}"
        )
    return KINDS[name]


def _kind(*, pair: str, matrix: str) -> Kind:
    """Guides go by the rule of matrices."""
    return Kind({"pair": pair, "matrix": matrix, "guide": matrix, "other": "adamw"})


KINDS: Registry[Kind] = Registry("optimizer.kind")
KINDS.register("adamw")(_kind(pair="adamw", matrix="adamw"))
KINDS.register("muon")(_kind(pair="muon", matrix="muon"))
KINDS.register("spectron")(_kind(pair="spectron", matrix="muon"))
KINDS.register("lora_muon")(_kind(pair="lora_muon", matrix="muon"))

"""Which linears become which structure, and how that is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from factorlm.accounting import config_for_param_ratio
from factorlm.anatomy import LinearModule, anatomy_of, is_linear, linear_sizes
from factorlm.config import check
from factorlm.errors import ConfigError, did_you_mean
from factorlm.layers import StructureConfig, structure_from_target

FilterFn: TypeAlias = Callable[[nn.Module, str], bool]
"""``(module, name) -> whether to swap it``, as in torchao."""


@dataclass(frozen=True)
class StructureMap:
    """One structure per layer name.

    ``rules`` maps an exact module name or an ``fnmatch`` pattern to a config, or to None for a
    layer that stays as it is. An exact name goes before any pattern; among patterns the first
    that matches wins; a name that nothing matches stays as it is.
    """

    rules: Mapping[str, StructureConfig | None]

    def __post_init__(self) -> None:
        for rule, config in self.rules.items():
            check(
                config is None or isinstance(config, StructureConfig),
                f"structure map: '{rule}' must be a StructureConfig or None, not {config!r}; "
                "StructureMap.from_targets reads plain mappings",
            )

    def config_for(self, name: str) -> StructureConfig | None:
        """The structure of the layer ``name``, None if it stays."""
        if name in self.rules:
            return self.rules[name]
        for pattern, config in self.rules.items():
            if fnmatchcase(name, pattern):
                return config
        return None

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ``ConfigError`` for a rule that matches none of ``names``."""
        names = list(names)
        for rule in self.rules:
            if not any(name == rule or fnmatchcase(name, rule) for name in names):
                raise ConfigError(
                    f"structure map: '{rule}' matches no linear layer.{did_you_mean(rule, names)}"
                )

    def to_targets(self) -> dict[str, Any]:
        """Plain JSON: rule -> ``StructureConfig.to_target()``, or null."""
        return {
            rule: None if config is None else config.to_target()
            for rule, config in self.rules.items()
        }

    @classmethod
    def from_targets(cls, targets: Mapping[str, Any]) -> StructureMap:
        """Read what ``to_targets`` wrote. Raises ``ConfigError`` naming the rule."""
        rules: dict[str, StructureConfig | None] = {}
        for rule, target in targets.items():
            check(
                target is None or isinstance(target, Mapping),
                f"structure map: '{rule}' must be a mapping with a structure, or null",
            )
            try:
                rules[rule] = None if target is None else structure_from_target(target)
            except ConfigError as error:
                raise ConfigError(f"structure map: '{rule}': {error}") from None
        return cls(rules)


def default_multiple(in_features: int, out_features: int) -> int:
    """The multiple that ranks are rounded to where the user names none.

    The largest power of two that is at most 64 and at most min(I, O)/32: 64 from width 2048 on,
    16 at width 768, 1 below 64. So the share that is reached stays within a few percent of the
    one asked for at any width, and 0.32 and 0.63 give the papers' ranks.
    """
    limit = max(1, min(64, min(in_features, out_features) // 32))
    return 1 << (limit.bit_length() - 1)


def solve(
    config: StructureConfig,
    module: LinearModule,
    param_ratio: float | None,
    multiple_of: int | None,
) -> StructureConfig:
    """``config`` with its free size solved for a parameter share, checked against ``module``."""
    sizes = linear_sizes(module)
    if param_ratio is not None:
        multiple = default_multiple(*sizes) if multiple_of is None else multiple_of
        config = config_for_param_ratio(config, *sizes, param_ratio, multiple_of=multiple)
    config.validate(*sizes)
    return config


def choose(
    model: nn.Module,
    config: StructureConfig | StructureMap,
    filter_fn: FilterFn | None,
    keep_first_dense: bool,
) -> dict[str, StructureConfig]:
    """Layer name -> structure, for every layer that is to be swapped. Never empty.

    Raises ``ConfigError`` naming what was looked at if nothing matches, and for a rule of a
    ``StructureMap`` that matches nothing or names a weight that is tied.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    tied = _tied_parameters(model)
    free = {
        name: module
        for name, module in linears.items()
        if not any(id(parameter) in tied for parameter in module.parameters())
    }
    if isinstance(config, StructureMap):
        _check_rules(config, linears, free)
        chosen = {name: config.config_for(name) for name in free}
    else:
        names = free if filter_fn else _ffn_names(model, keep_first_dense)
        chosen = {name: config for name in names if name in free}
    if filter_fn is not None:
        chosen = {name: rule for name, rule in chosen.items() if filter_fn(free[name], name)}
    found = {name: rule for name, rule in chosen.items() if rule is not None}
    if not found:
        raise ConfigError(_nothing_matched(model, list(free), filter_fn or config))
    return found


def _ffn_names(model: nn.Module, keep_first_dense: bool) -> list[str]:
    sites = anatomy_of(model).ffn_linears
    return [site.name for site in sites if site.layer_index > 0 or not keep_first_dense]


def _tied_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds, as a tied head's weight."""
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    return {key for key, count in owners.items() if count > 1}


def _check_rules(
    rules: StructureMap, linears: Mapping[str, object], free: Mapping[str, object]
) -> None:
    rules.check_used(linears)
    for name in rules.rules:
        check(
            name not in linears or name in free or rules.rules[name] is None,
            f"structure map: '{name}' has a weight that is tied to another module's",
        )


def _nothing_matched(model: nn.Module, names: list[str], choice: object) -> str:
    anatomy = anatomy_of(model)
    looked = f"{len(names)} linear layers in {type(model).__name__}"
    if names:
        looked += f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    if callable(choice):
        return f"filter_fn chose none of the {looked}"
    if isinstance(choice, StructureMap):
        return f"the structure map leaves all of the {looked} as they are"
    if anatomy.experts and not anatomy.ffn_linears:
        return (
            f"{type(model).__name__} keeps its FFN in expert tensors of three dimensions "
            f"({anatomy.experts[0].name}, ...), which a swap of linear layers cannot reach"
        )
    return (
        f"no FFN linear to swap among the {looked}: {len(anatomy.decoder_layers)} decoder layers "
        f"with {len(anatomy.ffn_linears)} FFN linears were found"
        + ("; the first layer stays dense (keep_first_dense)" if anatomy.ffn_linears else "")
    )

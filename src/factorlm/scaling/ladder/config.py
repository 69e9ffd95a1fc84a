"""The ladder's file: families, sizes, and the rules for tokens, seeds and rates (torch-free)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from factorlm.config import Config, check
from factorlm.errors import ConfigError, did_you_mean
from factorlm.train.config import TrainConfig
from factorlm.train.recipe import merge_sections, read_mapping, read_sections

DERIVED = ("name", "seed", "labels", "extends")
"""Fields of a recipe that the ladder states itself."""


@dataclass(frozen=True, kw_only=True)
class TokenRule(Config):
    """How long each run trains. Parameters are those beside the embedding and head."""

    rule: Literal["dense_twin", "own", "fixed", "iso_flops"] = "dense_twin"
    """``dense_twin``: ``per_parameter`` tokens for each parameter of the size with its FFN dense
    and nothing of a family, so that all families of a size get the same; ``own``: of the run's own
    model; ``fixed``: ``num_tokens``; ``iso_flops``: every run once for each of ``flops``."""
    per_parameter: float = 20.0
    """Tokens a parameter, for ``dense_twin`` and ``own``."""
    num_tokens: int | None = None
    """For ``fixed``."""
    flops: list[float] = field(default_factory=list)
    """For ``iso_flops``: training FLOPs of a run, by the papers' convention, head included."""

    def __post_init__(self) -> None:
        each = self.per_parameter
        check(0 < each < math.inf, f"tokens.per_parameter={each} must be finite and above 0")
        stated = self.num_tokens is not None
        check(
            (self.rule == "fixed") == stated and (self.num_tokens or 1) >= 1,
            f"tokens.num_tokens={self.num_tokens} is for tokens.rule='fixed', and at least 1",
        )
        check(
            (self.rule == "iso_flops") == bool(self.flops)
            and all(0 < flops < math.inf for flops in self.flops),
            f"tokens.flops={self.flops} is for tokens.rule='iso_flops': a list of finite numbers "
            "above 0",
        )


@dataclass(frozen=True, kw_only=True)
class RateRule(Config):
    """Where a family's learning rate comes from."""

    rule: Literal["recipe", "tune"] = "recipe"
    """``recipe``: what the recipe, the size and the family state. ``tune``: a grid at each of
    ``sizes``, with seed 0, and its best between the rates by a parabola; every size then takes the
    straight line through log(parameters beside the embedding) and log(best rate) of its family."""
    values: list[float] = field(default_factory=list)
    """For ``tune``: the grid, at least three rates. It is extended outward, by the ratio of the two
    at that end, until the best does not lie at an edge."""
    sizes: list[str] = field(default_factory=list)
    """For ``tune``: the sizes to tune at."""
    token_share: float = 1.0
    """For ``tune``: share of a run's tokens. A rate that is best for a quarter of the tokens is too
    high for all of them (reports/quality)."""

    def __post_init__(self) -> None:
        tunes = self.rule == "tune"
        check(
            tunes == bool(self.values) and tunes == bool(self.sizes),
            f"rate.rule={self.rule!r}, values={self.values}, sizes={self.sizes}: 'tune' states "
            "both values and sizes, 'recipe' neither",
        )
        check(
            not tunes
            or (
                len(set(self.values)) == len(self.values) >= 3
                and all(0 < rate < math.inf for rate in self.values)
            ),
            f"rate.values={self.values} must be at least three rates, finite and above 0, each "
            "once",
        )
        check(
            len(set(self.sizes)) == len(self.sizes),
            f"rate.sizes={self.sizes} must name each size once",
        )
        share = self.token_share
        check(0 < share <= 1, f"rate.token_share={share} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ExecutorSection(Config):
    """Where runs run."""

    kind: str = "local"
    """``local``: processes on this machine; ``ray``: tasks of a Ray cluster; ``slurm``: jobs."""
    workers: int | None = None
    """Runs at a time. None: as many as there is room for (slurm: 16)."""
    threads: int = 1
    """CPU threads of one run."""
    gpus: int | None = None
    """GPUs of one run, 0 or 1. None: 1 where the machine or the Ray cluster has any, else 0; a job
    of slurm then gets what its options and the partition give it."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the cluster is told: for ray, arguments of ``ray.init`` (``address: auto``); for
    slurm, of submitit's ``update_parameters`` (``timeout_min``, ``slurm_partition``, ...)."""

    def __post_init__(self) -> None:
        workers = self.workers
        check(workers is None or workers >= 1, f"executor.workers={workers} must be at least 1")
        check(self.threads >= 1, f"executor.threads={self.threads} must be at least 1")
        check(self.gpus in (None, 0, 1), f"executor.gpus={self.gpus} must be 0 or 1")


@dataclass(frozen=True, kw_only=True)
class Ladder(Config):
    """A ladder as its file states it. See ``docs/how-to/run-a-ladder.md`` for an example."""

    name: str
    """Names the folder of its runs, ``runs/<name>``."""
    recipe: str
    """What all runs share: a recipe, relative to the ladder's file."""
    sizes: dict[str, dict[str, Any]]
    """Name -> sections of the recipe, smallest first."""
    families: dict[str, dict[str, Any]]
    """Name -> sections of the recipe, over those of the size; under ``sizes``, by a size's name,
    what the family states otherwise at that size."""
    tokens: TokenRule = field(default_factory=TokenRule)
    seeds: int = 1
    """Runs of a family and size, with seeds 0, 1, ..."""
    seeds_by_size: dict[str, int] = field(default_factory=dict)
    """Other numbers of seeds for some sizes."""
    rate: RateRule = field(default_factory=RateRule)
    executor: ExecutorSection = field(default_factory=ExecutorSection)

    def __post_init__(self) -> None:
        plain = self.name and self.name not in (".", "..") and not set(self.name) & set("/\\\0")
        check(bool(plain), f"name={self.name!r} must be a plain folder name")
        check(bool(self.sizes), "sizes={} must name at least one size")
        check(bool(self.families), "families={} must name at least one family")
        for place, names in self._named_sizes().items():
            for name in names:
                known = f"known: {', '.join(self.sizes)}.{did_you_mean(name, self.sizes)}"
                check(name in self.sizes, f"{place} names an unknown size {name!r}; {known}")
        for place, sections in self._sections():
            for key in DERIVED:
                check(key not in sections, f"{place}.{key} is stated by the ladder itself")
        counts = [self.seeds, *self.seeds_by_size.values()]
        check(min(counts) >= 1, f"seeds={counts} must be at least 1")

    def num_seeds(self, size: str) -> int:
        """Runs of each family at ``size``."""
        return self.seeds_by_size.get(size, self.seeds)

    def sections(self, size: str, family: str | None = None) -> dict[str, Any]:
        """What a run of ``family`` states over the recipe; without one, what the size does."""
        found = dict(self.sizes[size])
        if family is None:
            return found
        stated = dict(self.families[family])
        own = stated.pop("sizes", {}).get(size, {})
        return merge_sections(merge_sections(found, stated), own)

    def _named_sizes(self) -> dict[str, list[str]]:
        """Where sizes are named -> which."""
        places = {"seeds_by_size": list(self.seeds_by_size), "rate.sizes": self.rate.sizes}
        for name, stated in self.families.items():
            own = stated.get("sizes", {})
            check(isinstance(own, dict), f"families.{name}.sizes={own!r} must map sizes")
            places[f"families.{name}.sizes"] = list(own)
        return places

    def _sections(self) -> list[tuple[str, Mapping[str, Any]]]:
        found: list[tuple[str, Mapping[str, Any]]] = [
            (f"sizes.{name}", stated) for name, stated in self.sizes.items()
        ]
        for name, stated in self.families.items():
            found.append((f"families.{name}", stated))
            for size, own in stated.get("sizes", {}).items():
                found.append((f"families.{name}.sizes.{size}", own))
        for place, sections in found:
            check(isinstance(sections, dict), f"{place}={sections!r} must be sections of a recipe")
        return found


@dataclass(frozen=True)
class LadderFile:
    """A ladder beside what the recipe that it builds on states."""

    ladder: Ladder
    base: Mapping[str, Any]

    def config(
        self, name: str, size: str, family: str | None, extra: Mapping[str, Any]
    ) -> TrainConfig:
        """The recipe of a run with ``extra`` over it all. Raises ``ConfigError`` naming the run."""
        sections = merge_sections(self.base, self.ladder.sections(size, family))
        try:
            return TrainConfig.from_dict(merge_sections(sections, extra) | {"name": name})
        except ConfigError as error:
            raise ConfigError(f"ladder {self.ladder.name}, run {name}: {error}") from None


def load_ladder(path: str | os.PathLike[str]) -> LadderFile:
    """Read a ladder and its recipe. Raises ``ConfigError`` naming file, field, value and rule."""
    path = Path(path)
    values = {"name": path.stem} | read_mapping(path, "ladder")
    missing = [key for key in ("recipe", "sizes", "families") if key not in values]
    check(not missing, f"{path}: {', '.join(missing)} must be stated")
    try:
        _check_shape(values)
        ladder = Ladder.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return LadderFile(ladder, read_sections(path.parent / ladder.recipe))


def _check_shape(values: Mapping[str, Any]) -> None:
    """What YAML makes of a value that was left empty, and of a name that is a number."""
    for section in ("tokens", "rate", "executor"):
        stated = values.get(section, {})
        check(isinstance(stated, Mapping), f"{section}={stated!r} must be a mapping of fields")
    for section in ("sizes", "families"):
        found = values[section]
        check(isinstance(found, Mapping), f"{section}={found!r} must map names to sections")
        for name, stated in found.items():
            place = f"{section}.{name}"
            check(isinstance(name, str), f"{place}: a name is a text; write it in quotes, '{name}'")
            check(
                isinstance(stated, Mapping),
                f"{place}={stated!r} must be sections of a recipe; {{}} for none",
            )

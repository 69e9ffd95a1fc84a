"""What a structure says before anything is built: ``Factor``, ``StructureConfig``, the registry.

Letters: I = in_features, O = out_features, R = rank, G = num_blocks, N = tokens, m = min(I, O).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, get_args

import torch

from factorlm.config import Config, check
from factorlm.errors import ConfigError
from factorlm.registry import Registry

if TYPE_CHECKING:
    from factorlm.layers.base import StructuredLinear

Init = Literal["paper", "structure_aware"]
LayerClass = TypeVar("LayerClass", bound="type[StructuredLinear]")


@dataclass(frozen=True)
class Factor:
    """One factor of a structured weight: a matrix, or a stack of diagonal blocks."""

    name: str
    """The name of its parameter, in modules and in files."""
    shape: tuple[int, ...]
    """The shape of its parameter: (fan_out, fan_in), or (num_blocks, fan_out, fan_in)."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks on its diagonal."""
        return math.prod(self.shape[:-2])

    @property
    def fan_in(self) -> int:
        """Inputs of one block."""
        return self.shape[-1]

    @property
    def fan_out(self) -> int:
        """Outputs of one block."""
        return self.shape[-2]

    @property
    def num_params(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class StructureConfig(Config, ABC):
    """How one dense weight (O, I) is replaced by a product of small factors.

    Nothing here allocates a tensor but ``build``.
    """

    kind: ClassVar[str]
    """The registered name."""
    layer: ClassVar[type[StructuredLinear]]
    """The class that ``build`` makes. Both are set by ``register_structure``."""
    version: ClassVar[int] = 1
    """Raised when the meaning of the saved fields or factors changes."""

    init: Init = "paper"
    """``paper``: the initialisation of arXiv 2406.16450; ``structure_aware``: each factor is
    Gaussian with std fan_in^-1/2 * min(1, (fan_out/fan_in)^1/2) (Compute Better Spent)."""

    def __post_init__(self) -> None:
        check(self.init in get_args(Init), f"init={self.init!r} must be one of {get_args(Init)}")

    @abstractmethod
    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """The factors in order of application.

        Raises ``ConfigError`` naming field, value and rule where the sizes do not fit.
        """

    @abstractmethod
    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """Matmul FLOPs of computing the dense weight from the factors."""

    @abstractmethod
    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """A copy whose weights number about ``ratio`` * I * O, its free size a multiple of
        ``multiple_of`` where the structure allows it."""

    def validate(self, in_features: int, out_features: int) -> None:
        """Raise ``ConfigError`` where the sizes do not fit; warn where they fit badly."""
        check(in_features >= 1, f"in_features={in_features} must be at least 1")
        check(out_features >= 1, f"out_features={out_features} must be at least 1")
        self.factors(in_features, out_features)

    def build(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StructuredLinear:
        """Allocate and initialise the layer."""
        return self.layer(self, in_features, out_features, bias=bias, device=device, dtype=dtype)

    def num_params(self, in_features: int, out_features: int) -> int:
        """Weights of all factors, without bias."""
        return sum(factor.num_params for factor in self.factors(in_features, out_features))

    def flops_per_token(self, in_features: int, out_features: int) -> int:
        """Forward matmul FLOPs of one token: two for each weight."""
        return 2 * self.num_params(in_features, out_features)

    def to_target(self) -> dict[str, Any]:
        """The plain form that model folders and recipes hold: structure, version, own fields."""
        return {"structure": self.kind, "version": self.version} | self.to_dict()


STRUCTURES: Registry[type[StructureConfig]] = Registry("structure")
"""Name to config class: what recipes and files call a structure."""


def register_structure(
    name: str, config: type[StructureConfig]
) -> Callable[[LayerClass], LayerClass]:
    """Decorator of a layer class: ``config`` builds it and goes by ``name`` in recipes and files.

    Raises ``ConfigError`` for a name that is taken.
    """

    def add(layer: LayerClass) -> LayerClass:
        STRUCTURES.register(name)(config)
        config.kind = name
        config.layer = layer
        return layer

    return add


def structure_from_target(target: Mapping[str, Any]) -> StructureConfig:
    """Read what ``StructureConfig.to_target`` wrote; ``version`` may be left out.

    Raises ``ConfigError`` for an unknown structure, an unknown field, or another version.
    """
    fields = dict(target)
    kind = fields.pop("structure", None)
    check(isinstance(kind, str), f"structure={kind!r} must be one of {', '.join(STRUCTURES)}")
    cls = STRUCTURES[str(kind)]
    version = fields.pop("version", cls.version)
    check(
        version == cls.version,
        f"version={version} of structure '{kind}' is not readable here (it reads {cls.version})",
    )
    return cls.from_dict(fields)


def check_count(name: str, value: int) -> None:
    """Refuse what is no Python ``int``, which a file could not hold, and numbers below 1."""
    check(type(value) is int, f"{name}={value!r} must be an int")
    check(value >= 1, f"{name}={value} must be at least 1")


def check_ratio(ratio: float, multiple_of: int) -> None:
    """Refuse a parameter share or a multiple that no structure can serve."""
    check(0 < ratio < math.inf, f"ratio={ratio} must be above 0 and finite")
    check(multiple_of >= 1, f"multiple_of={multiple_of} must be at least 1")


def check_rank(rank: int | None, limit: int, rule: str) -> int:
    """``rank`` as a number, not None and not over ``limit``, which is what ``rule`` says."""
    if rank is None:
        raise ConfigError("rank=None must be a number, or be solved for a param_ratio")
    check(rank <= limit, f"rank={rank} exceeds {rule}={limit}")
    return rank


def check_divides(num_blocks: int, **sizes: int) -> None:
    """Refuse sizes that ``num_blocks`` does not divide, naming the nearest that it does."""
    for name, size in sizes.items():
        if size % num_blocks:
            below = size - size % num_blocks
            above = below + num_blocks
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"num_blocks={num_blocks} does not divide {name}={size}; "
                f"nearest sizes that it divides: {nearest}"
            )


def round_to_multiple(value: float, multiple_of: int, *, at_most: int) -> int:
    """The multiple of ``multiple_of`` nearest to ``value``, at least one, not over ``at_most``.

    Where ``at_most`` is below one multiple the result is ``at_most``.
    """
    largest = max(at_most // multiple_of, 1) * multiple_of
    nearest = max(round(value / multiple_of), 1) * multiple_of
    return min(nearest, largest, at_most)

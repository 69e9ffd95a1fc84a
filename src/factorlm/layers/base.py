"""The contract of every structured linear layer: ``Factor``, ``StructureConfig``, ``StructuredLinear``.

Letters: I = in_features, O = out_features, R = rank, G = num_blocks, N = tokens, m = min(I, O).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from factorlm.config import Config, check
from factorlm.errors import ConfigError
from factorlm.registry import Registry


@dataclass(frozen=True)
class Factor:
    """One factor of a structured weight: ``num_blocks`` blocks, each (fan_out, fan_in)."""

    name: str
    """The name of its parameter, in modules and in files."""
    num_blocks: int
    fan_in: int
    fan_out: int

    @property
    def num_params(self) -> int:
        """Number of weights."""
        return self.num_blocks * self.fan_in * self.fan_out


STRUCTURES: Registry[type[StructureConfig]] = Registry("structure")


def register_structure(name: str) -> Callable[[Any], Any]:
    """Class decorator: make a ``StructureConfig`` known under ``name`` in recipes and files."""

    def add(cls: Any) -> Any:
        cls.kind = name
        return STRUCTURES.register(name)(cls)

    return add


@dataclass(frozen=True, kw_only=True)
class StructureConfig(Config, ABC):
    """How one dense weight (O, I) is replaced by a product of small factors.

    Nothing here allocates a tensor but ``build``.
    """

    kind: ClassVar[str]
    """The registered name."""
    version: ClassVar[int] = 1
    """Raised when the meaning of the saved fields or factors changes."""

    init: Literal["paper", "structure_aware"] = "paper"
    """``paper``: the initialisation of arXiv 2406.16450; ``structure_aware``: each factor is
    Gaussian with std fan_in^-1/2 * min(1, (fan_out/fan_in)^1/2) (Compute Better Spent)."""

    @abstractmethod
    def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
        """The factors in order of application. Raises ``ConfigError`` where sizes do not fit."""

    @abstractmethod
    def validate(self, in_features: int, out_features: int) -> None:
        """Raise ``ConfigError`` naming field, value and rule where the sizes do not fit."""

    @abstractmethod
    def to_dense_flops(self, in_features: int, out_features: int) -> int:
        """FLOPs of computing the dense weight from the factors."""

    @abstractmethod
    def for_param_ratio(
        self, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
    ) -> Self:
        """A copy whose weights number about ``ratio`` * I * O, its free size a multiple of
        ``multiple_of`` where the structure allows it."""

    @abstractmethod
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

    def num_params(self, in_features: int, out_features: int) -> int:
        """Weights of all factors, without bias."""
        return sum(factor.num_params for factor in self.factors(in_features, out_features))

    def flops_per_token(self, in_features: int, out_features: int) -> int:
        """Forward matmul FLOPs of one token: two for each weight."""
        return 2 * self.num_params(in_features, out_features)

    def to_target(self) -> dict[str, Any]:
        """The plain form that model folders and recipes hold: structure, version, own fields."""
        return {"structure": self.kind, "version": self.version} | self.to_dict()


def structure_from_target(target: Mapping[str, Any]) -> StructureConfig:
    """Read what ``StructureConfig.to_target`` wrote; ``version`` may be left out.

    Raises ``ConfigError`` for an unknown structure, an unknown field, or a newer version.
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


def check_ratio(ratio: float, multiple_of: int) -> None:
    """Refuse a parameter share or a multiple that no structure can serve."""
    check(0 < ratio, f"ratio={ratio} must be above 0")
    check(multiple_of >= 1, f"multiple_of={multiple_of} must be at least 1")


def round_to_multiple(value: float, multiple_of: int, *, at_most: int) -> int:
    """The multiple of ``multiple_of`` nearest to ``value``, at least one of it, not over ``at_most``.

    Where ``at_most`` is below one multiple the result is ``at_most``.
    """
    largest = max(at_most // multiple_of, 1) * multiple_of
    nearest = max(round(value / multiple_of), 1) * multiple_of
    return min(nearest, largest, at_most)


def check_divides(num_blocks: int, **sizes: int) -> None:
    """Refuse sizes that ``num_blocks`` does not divide, naming the nearest that it does."""
    check(num_blocks >= 1, f"num_blocks={num_blocks} must be at least 1")
    for name, size in sizes.items():
        if size % num_blocks:
            below, above = size // num_blocks * num_blocks, -(-size // num_blocks) * num_blocks
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"num_blocks={num_blocks} does not divide {name}={size}; "
                f"nearest sizes that it divides: {nearest}"
            )


class StructuredLinear(nn.Module, ABC):
    """y = x Wᵀ + b with W (O, I) a product of factors: what ``nn.Linear`` is, for structures.

    A concrete class is final, declares its factors as parameters under the names that its config
    states, and implements the abstract methods. The battery in ``factorlm.testing.contract``
    proves a class.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        config: StructureConfig,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        config.validate(in_features, out_features)
        self.config = config
        self.in_features = in_features
        self.out_features = out_features
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The exact dense weight, (O, I), differentiable in the factors."""

    @abstractmethod
    def project_(self, weight: Tensor) -> Self:
        """Set the factors to the best approximation of ``weight`` (O, I) in Frobenius norm, with
        S^1/2 on each side. Computed in float32 or wider. The bias is left as it is."""

    @abstractmethod
    def reset_factors(self, std: float | None, generator: torch.Generator | None) -> None:
        """Draw the factors anew; see ``reset_parameters``."""

    @final
    @torch.no_grad()
    def reset_parameters(
        self, *, std: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw the factors anew and zero the bias.

        Drawn on the CPU in float32, so the values are equal on every device. ``std`` is the
        standard deviation of the dense weight whose structure is drawn (dense and low_rank only);
        None means ``nn.Linear``'s 1/sqrt(3 I).
        """
        self.reset_factors(std, generator)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of this layer, in order of application."""
        return self.config.factors(self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """A detached dense copy, (O, I), for code that expects ``nn.Linear.weight`` to read.

        Writing to it changes nothing. Flagged as initialised for transformers' ``_init_weights``.
        """
        dense = self.to_dense().detach()
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        return dense

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: StructureConfig) -> StructuredLinear:
        """The best approximation of ``linear`` by ``config``, on its device and in its dtype."""
        layer = config.build(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            layer.project_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.train(linear.training)
        return layer

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same weight, bias, device and dtype."""
        parameter = next(self.parameters())
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.to_dense())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.train(self.training)
        return linear

    @torch.no_grad()
    def relative_error(self, weight: Tensor) -> float:
        """‖W − to_dense()‖ / ‖W‖ in Frobenius norm, computed in float64. ``weight`` is (O, I)."""
        dense, weight = self.to_dense().double(), weight.double()
        return float(torch.linalg.norm(weight - dense) / torch.linalg.norm(weight))

    def extra_repr(self) -> str:
        """Sizes and the config's own fields."""
        fields = [f"{f.name}={getattr(self.config, f.name)}" for f in dataclasses.fields(self.config)]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return ", ".join([sizes, f"bias={self.bias is not None}", *fields])

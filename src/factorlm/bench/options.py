"""What a benchmark is run over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from factorlm.config import Config, check
from factorlm.errors import ConfigError
from factorlm.layers import STRUCTURES, BlockShuffleConfig, StructureConfig
from factorlm.measure import has_fast_bf16

Pass = Literal["forward", "forward+backward"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def unsolved_config(structure: str) -> StructureConfig:
    """What every benchmark builds of a structure, before its size is solved for a share.

    block_shuffle leaves its last shuffle out (``output_shuffle=False``): a fixed order of the
    outputs, which costs no quality and would cost a copy.
    """
    config = STRUCTURES[structure]()
    if isinstance(config, BlockShuffleConfig):
        return config.replace(output_shuffle=False)
    return config


def quick_start(config: StructureConfig) -> StructureConfig:
    """The same without the SVD of its initialisation, on which no time of a product depends."""
    return config.replace(init="structure_aware")


@dataclass(frozen=True)
class LinearSetting:
    """What one record of a linear layer, or of an FFN, is about."""

    shape: tuple[int, int]
    num_tokens: int
    dtype: str
    kind: Pass
    configs: Mapping[str, StructureConfig]
    device: torch.device
    share: float
    """That was asked for; ``configs`` say what it came to."""

    @property
    def like(self) -> Tensor:
        """An empty tensor with the device and the dtype of weights and inputs."""
        return torch.empty(0, device=self.device, dtype=DTYPES[self.dtype])

    def draw(self, width: int, *, count: int = 1) -> tuple[Tensor, ...]:
        """``count`` random tensors (N, width), drawn where they are used: of a wide FFN's many
        tokens the host would take a minute."""
        size = (count, self.num_tokens, width)
        return torch.randn(size, device=self.device).to(self.like).unbind()

    @property
    def is_promised(self) -> bool:
        """Whether the bars are meant for this size: training sizes, where matmuls decide."""
        return min(self.shape) >= 768 and self.num_tokens >= 4096

    def to_dict(self) -> dict[str, Any]:
        """As records hold it."""
        return {
            "shape": list(self.shape),
            "num_tokens": self.num_tokens,
            "dtype": self.dtype,
            "pass": self.kind,
            "share": self.share,
            "structures": {name: config.to_target() for name, config in self.configs.items()},
        }


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Config):
    """Shapes, structures and dtypes; each benchmark reads the fields that concern it."""

    shapes: tuple[tuple[int, int], ...] = ((768, 3072), (2048, 8192))
    """(in_features, out_features) of a linear; an FFN is that and back."""
    num_tokens: tuple[int, ...] = (4096,)
    structures: tuple[str, ...] = ("low_rank", "block_shuffle", "block_dense")
    share: float = 0.3125
    """Of the dense weight's parameters; 0.3125 is the papers' 32 %, rank a quarter of the width."""
    dtypes: tuple[str, ...] = ()
    """Of weights and computation; empty: float32, and bf16 where the device computes in it."""
    passes: tuple[Pass, ...] = get_args(Pass)
    device: str = "cpu"
    rounds: int = 15
    gated: bool = False
    """An FFN as in Llama, SwiGLU without biases, in place of GELU with biases."""
    compiled: bool = False
    """Of an FFN, dense and low_rank, and of a model, all of them: also through ``torch.compile``,
    which takes a while first."""

    def __post_init__(self) -> None:
        check(0 < self.share <= 1, f"share={self.share} must lie in (0, 1]")
        check(self.rounds >= 2, f"rounds={self.rounds} must be at least 2")
        sizes = [*self.num_tokens, *(size for shape in self.shapes for size in shape)]
        check(min(sizes, default=1) >= 1, "shapes and num_tokens must be at least 1")
        for name in self.structures:
            STRUCTURES[name]  # raises for an unknown one
        for name in self.dtypes:
            check(name in DTYPES, f"dtype {name!r} must be one of {', '.join(DTYPES)}")
        for name in self.passes:
            check(name in get_args(Pass), f"pass {name!r} must be one of {get_args(Pass)}")

    @property
    def dtype_names(self) -> tuple[str, ...]:
        """The dtypes to measure."""
        kind = torch.device(self.device).type
        return self.dtypes or (("fp32", "bf16") if has_fast_bf16(kind) else ("fp32",))

    def linear_settings(self) -> Iterator[LinearSetting]:
        """Every shape, number of tokens, dtype and pass."""
        grid = itertools.product(self.shapes, self.num_tokens, self.dtype_names, self.passes)
        for shape, num_tokens, dtype, kind in grid:
            configs = self.configs(*shape)
            device = torch.device(self.device)
            yield LinearSetting(shape, num_tokens, dtype, kind, configs, device, self.share)

    def configs(self, in_features: int, out_features: int) -> dict[str, StructureConfig]:
        """Structure -> its config at the share (``unsolved_config``)."""
        found = {}
        for name in self.structures:
            try:
                config = unsolved_config(name).for_param_ratio(
                    in_features, out_features, self.share, multiple_of=16
                )
                config.validate(in_features, out_features)
            except ConfigError as error:
                raise ConfigError(f"{name} for {in_features}x{out_features}: {error}") from None
            found[name] = config
        return found

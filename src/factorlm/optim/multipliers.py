"""Learning-rate multipliers of factors: structure-aware rates for Adam.

Compute Better Spent (ICML 2024) and Searching for Efficient Linear Layers (NeurIPS 2024).
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from factorlm.config import check
from factorlm.errors import ConfigError
from factorlm.layers import StructureConfig


def factor_multipliers(
    config: StructureConfig, in_features: int, out_features: int
) -> tuple[float, ...]:
    """(I / fan_in) / number of factors, for each factor in order of application.

    The rate of a dense weight of I inputs, carried over to a factor whose blocks have ``fan_in``,
    and shared among the factors, since the change of a product is the sum of theirs. low_rank:
    V 1/2, U I/(2R); block_shuffle: first G/2, second I G/(2m); block_dense: B G/2, L I/(2R).
    """
    factors = config.factors(in_features, out_features)
    return tuple(in_features / factor.fan_in / len(factors) for factor in factors)


def width_multiplier(model: nn.Module, base_width: int | None) -> float:
    """``base_width`` / hidden size, for hidden matrices; 1 where ``base_width`` is None.

    Raises ``ConfigError`` for a width below 1, and for a model without a Hugging Face config.
    """
    if base_width is None:
        return 1.0
    check(base_width >= 1, f"base_width={base_width} must be at least 1")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"base_width={base_width} needs a model whose config states hidden_size, "
            f"not a {type(model).__name__}"
        )
    return float(base_width / model.config.get_text_config().hidden_size)

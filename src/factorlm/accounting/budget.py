"""Ranks and block counts for a budget of parameters or FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from factorlm.accounting.flops import flops_per_token
from factorlm.accounting.params import count_params
from factorlm.anatomy import LinearSite, anatomy_of
from factorlm.config import check
from factorlm.layers import StructureConfig

S = TypeVar("S", bound=StructureConfig)


def config_for_param_ratio(
    config: S, in_features: int, out_features: int, ratio: float, *, multiple_of: int = 1
) -> S:
    """``config`` with its free size solved so that its weights number about ``ratio`` of a dense
    linear's; see ``StructureConfig.for_param_ratio``."""
    return config.for_param_ratio(in_features, out_features, ratio, multiple_of=multiple_of)


@dataclass(frozen=True)
class BudgetPlan:
    """One config per FFN linear, and what the model then costs."""

    configs: Mapping[str, StructureConfig]
    """Module name -> its config; the linears that stay dense are left out."""
    param_ratio: float
    """The share of the replaced linears' weights that the budget leaves."""
    num_params: int
    """Parameters of the whole model that the plan reaches."""


def plan_for_params(
    model: nn.Module,
    config: StructureConfig,
    num_params: int,
    *,
    keep_first_dense: bool = True,
    multiple_of: int = 1,
) -> BudgetPlan:
    """Sizes of ``config`` with which ``model`` has about ``num_params`` parameters in all.

    Every FFN linear gets the same share, rounded as the structure does for ``multiple_of``; those
    of the first decoder layer stay as they are unless ``keep_first_dense`` is False. Raises
    ``ConfigError`` where the budget leaves nothing for the FFN, or is more than dense linears need.
    """
    sites = _targets(model, keep_first_dense)
    total = count_params(model).total
    rest = total - sum(site.num_params for site in sites)
    ratio = _ratio("num_params", num_params, rest, _num_dense(sites))
    configs = _solve(config, sites, ratio, multiple_of)
    reached = sum(configs[s.name].num_params(s.in_features, s.out_features) for s in sites)
    return BudgetPlan(configs, ratio, rest + reached)


def plan_for_flops(
    model: PreTrainedModel,
    config: StructureConfig,
    forward_flops_per_token: int,
    *,
    seq_len: int,
    keep_first_dense: bool = True,
    multiple_of: int = 1,
) -> BudgetPlan:
    """The same for a budget of forward FLOPs a token, in sequences of ``seq_len`` tokens."""
    sites = _targets(model, keep_first_dense)
    weights = sum(site.num_params for site in sites)
    rest = flops_per_token(model, seq_len).total - 2 * weights
    budget = forward_flops_per_token
    ratio = _ratio("forward_flops_per_token", budget, rest, 2 * _num_dense(sites))
    configs = _solve(config, sites, ratio, multiple_of)
    reached = sum(configs[s.name].num_params(s.in_features, s.out_features) for s in sites)
    return BudgetPlan(configs, ratio, count_params(model).total - weights + reached)


def _targets(model: nn.Module, keep_first_dense: bool) -> list[LinearSite]:
    sites = [s for s in anatomy_of(model).ffn_linears if s.layer_index or not keep_first_dense]
    check(bool(sites), f"{type(model).__name__} has no FFN linear to structure")
    return sites


def _num_dense(sites: list[LinearSite]) -> int:
    return sum(site.in_features * site.out_features for site in sites)


def _ratio(name: str, budget: int, rest: int, dense: int) -> float:
    """The share of ``dense`` that ``budget`` leaves beside ``rest``, all in one unit."""
    check(
        rest < budget <= rest + dense,
        f"{name}={budget:,} must be above {rest:,}, the cost of all else, and at most "
        f"{rest + dense:,}, the cost with those linears dense",
    )
    return (budget - rest) / dense


def _solve(
    config: StructureConfig, sites: list[LinearSite], ratio: float, multiple_of: int
) -> dict[str, StructureConfig]:
    return {
        site.name: config_for_param_ratio(
            config, site.in_features, site.out_features, ratio, multiple_of=multiple_of
        )
        for site in sites
    }

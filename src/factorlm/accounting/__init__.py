"""What a model costs, counted before it is built: parameters, FLOPs, memory, and budgets.

Every function takes a Hugging Face causal language model on any device, meta included, dense or
structured, and reads its structure through ``factorlm.anatomy``.
"""

from factorlm.accounting.attention import AttentionShape, attention_shapes
from factorlm.accounting.budget import (
    BudgetPlan,
    config_for_param_ratio,
    plan_for_flops,
    plan_for_params,
)
from factorlm.accounting.flops import FlopCount, flops_per_token
from factorlm.accounting.memory import MemoryEstimate, estimate_memory
from factorlm.accounting.params import ParamCount, count_params
from factorlm.accounting.plan import (
    StepPlan,
    guided_share,
    plan_guided,
    plan_without_guide,
    solved_guide_steps,
)
from factorlm.accounting.training import TrainingFlops, guide_flops, training_flops

__all__ = [
    "AttentionShape",
    "BudgetPlan",
    "FlopCount",
    "MemoryEstimate",
    "ParamCount",
    "StepPlan",
    "TrainingFlops",
    "attention_shapes",
    "config_for_param_ratio",
    "count_params",
    "estimate_memory",
    "flops_per_token",
    "guide_flops",
    "guided_share",
    "plan_for_flops",
    "plan_for_params",
    "plan_guided",
    "plan_without_guide",
    "solved_guide_steps",
    "training_flops",
]

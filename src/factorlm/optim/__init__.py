"""Optimizers, learning rates and guide schedules. Importing this package registers the rules."""

from factorlm.optim.adamw import AdamWRule
from factorlm.optim.build import build_optimizer
from factorlm.optim.factor_optimizer import FactorOptimizer
from factorlm.optim.flops import (
    guide_optimizer_flops,
    optimizer_flops,
    optimizer_state_bytes,
)
from factorlm.optim.guidance import GuideSchedule
from factorlm.optim.lora_muon import LoraMuonRule
from factorlm.optim.multipliers import factor_multipliers
from factorlm.optim.muon import MuonRule
from factorlm.optim.newton_schulz import newton_schulz
from factorlm.optim.release import release_
from factorlm.optim.rule import RULES, Rule
from factorlm.optim.schedule import learning_rate_at
from factorlm.optim.spectron import SpectronRule

__all__ = [
    "RULES",
    "AdamWRule",
    "FactorOptimizer",
    "GuideSchedule",
    "LoraMuonRule",
    "MuonRule",
    "Rule",
    "SpectronRule",
    "build_optimizer",
    "factor_multipliers",
    "guide_optimizer_flops",
    "learning_rate_at",
    "newton_schulz",
    "optimizer_flops",
    "optimizer_state_bytes",
    "release_",
]

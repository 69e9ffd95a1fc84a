"""Optimizers and their parameter groups."""

from factorlm.optim.adamw import build_adamw
from factorlm.optim.groups import decay_groups
from factorlm.optim.schedule import learning_rate_at

__all__ = ["build_adamw", "decay_groups", "learning_rate_at"]

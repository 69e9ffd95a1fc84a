"""Recipes and the training loop. The recipe part needs no torch."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.train.callbacks import Callback
    from factorlm.train.config import TrainConfig
    from factorlm.train.parallelize import parallelize_model
    from factorlm.train.recipe import load_recipe
    from factorlm.train.trainer import RunResult, Trainer

__all__ = [
    "Callback",
    "RunResult",
    "TrainConfig",
    "Trainer",
    "load_recipe",
    "parallelize_model",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Callback": "callbacks",
        "RunResult": "trainer",
        "TrainConfig": "config",
        "Trainer": "trainer",
        "load_recipe": "recipe",
        "parallelize_model": "parallelize",
    },
)

"""Recipes and the training loop. The recipe part needs no torch."""

from factorlm.lazy import lazy_exports

_EXPORTS = {
    "Callback": "callbacks",
    "RunResult": "trainer",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "load_recipe": "recipe",
    "parallelize_model": "parallelize",
}

__all__ = sorted(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

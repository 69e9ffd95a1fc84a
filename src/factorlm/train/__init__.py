"""Recipes and the training loop. The recipe part needs no torch."""

from factorlm.lazy import lazy_exports

_EXPORTS = {"TrainConfig": "config", "load_recipe": "recipe"}

__all__ = sorted(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

"""Loss of a model on text."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.eval.loss import EvalResult, evaluate_loss

__all__ = ["EvalResult", "evaluate_loss"]

__getattr__ = lazy_exports(__name__, {"EvalResult": "loss", "evaluate_loss": "loss"})

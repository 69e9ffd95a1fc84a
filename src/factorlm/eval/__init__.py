"""Loss of a model on text."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.eval.loss import EvalResult, evaluate_loss
    from factorlm.eval.text import check_tokenizer, evaluate_model, prepared_text

__all__ = ["EvalResult", "check_tokenizer", "evaluate_loss", "evaluate_model", "prepared_text"]

__getattr__ = lazy_exports(
    __name__,
    {
        "EvalResult": "loss",
        "check_tokenizer": "text",
        "evaluate_loss": "loss",
        "evaluate_model": "text",
        "prepared_text": "text",
    },
)

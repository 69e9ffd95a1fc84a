"""Mean loss per token over windows of a token stream, the same in training and after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from factorlm.data import EvalBatch
from factorlm.errors import DataError

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(inputs, labels), both (B, T) int64, to the summed cross entropy in nats, a scalar. Labels of
-100 are not predicted."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Loss on a text."""

    loss: float
    """Nats per token."""
    num_tokens: int
    """Tokens that were predicted."""
    bytes_per_token: float | None
    """UTF-8 bytes of the text by its number of tokens; None if they are not known."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinity where that overflows."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """loss / ln 2 / bytes per token: comparable between tokenizers."""
        if self.bytes_per_token is None:
            return None
        return self.loss / math.log(2) / self.bytes_per_token


def perplexity(loss: float) -> float:
    """exp(``loss``), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def evaluate_loss(
    loss_fn: LossFunction,
    batches: Iterable[EvalBatch],
    *,
    device: torch.device | str = "cpu",
    bytes_per_token: float | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> EvalResult:
    """Sum the loss over ``batches`` and divide by the number of predicted tokens.

    Args:
        loss_fn: e.g. a ``CausalLMLoss`` in eval mode; autocast is the caller's.
        batches: e.g. ``EvalWindows``.
        bytes_per_token: of the whole text, for bits per byte.
        add_up: adds the sums (nats, tokens), float64, over all processes.
        on_progress: told the tokens that this process has done, after each batch.

    Raises ``DataError`` if there is nothing to predict.
    """
    started = time.perf_counter()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = 0
    for batch in batches:
        inputs, labels = (torch.from_numpy(ids).to(device) for ids in (batch.inputs, batch.targets))
        nats += loss_fn(inputs, labels).double()
        num_tokens += batch.num_targets
        on_progress(num_tokens)
    count = torch.tensor(num_tokens, dtype=torch.float64, device=device)
    total, all_tokens = add_up(torch.stack([nats, count])).tolist()
    if all_tokens == 0:
        raise DataError("the text to evaluate has no token to predict: that takes two")
    return EvalResult(
        loss=total / all_tokens,
        num_tokens=int(all_tokens),
        bytes_per_token=bytes_per_token,
        seconds=time.perf_counter() - started,
    )

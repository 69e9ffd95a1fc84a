"""How the next token is chosen: the config, the filters, and the choice itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from factorlm.config import Config, check

LIKELY_TOKENS = 1024
"""The nucleus of ``top_p`` is looked for among so many tokens first: a whole sort costs more."""
LEAST_TEMPERATURE = 1e-30
"""Logits over a lower one overflow, and a draw is the most likely token anyway."""
NO_TOKEN = -1
"""Chosen from logits that are not finite."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen from the model's distribution."""

    greedy: bool = False
    """Always the most likely token; the other fields mean nothing then."""
    temperature: float = 0.8
    top_k: int | None = None
    """Only among the k most likely tokens; None: all."""
    top_p: float | None = 0.95
    """Only among the most likely tokens that hold this probability together; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        rule = "must be above 0 (greedy takes the most likely token) and finite"
        check(0 < self.temperature < math.inf, f"temperature={self.temperature} {rule}")
        check(self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be at least 1")
        top_p = self.top_p
        check(top_p is None or 0 < top_p <= 1, f"top_p={top_p} must lie in (0, 1]")


class Sampler:
    """Draws tokens by a ``Sampling``, from its own generator on the device of the logits."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row, (B,) int64, from logits (B, V). Never waits for a GPU.

        ``NO_TOKEN`` where the logit of the choice is not finite: any NaN of a row is its largest.
        """
        tokens = self._choose(logits)
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens.where(chosen.isfinite(), NO_TOKEN)

    def _choose(self, logits: Tensor) -> Tensor:
        """The largest of logit + Gumbel noise is a draw from the softmax (the Gumbel-max identity),
        and minus the logarithm of exponential noise is Gumbel noise.
        """
        if self._sampling.greedy or self._sampling.temperature < LEAST_TEMPERATURE:
            return logits.argmax(dim=-1)
        logits = filter_logits(logits.float(), self._sampling)
        noise = torch.empty_like(logits).exponential_(generator=self._generator)
        return (logits - noise.log_()).argmax(dim=-1)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) over the temperature, minus infinity for what may not be drawn.

    The order is Hugging Face's: temperature, ``top_k``, ``top_p``. A token as likely as the last
    one that is kept is kept too.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        floor = _nucleus_floor(logits, sampling.top_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


def _nucleus_floor(logits: Tensor, top_p: float) -> Tensor:
    """(B, 1): the least logit among the most likely tokens that hold ``top_p`` together.

    Looking at the result of the short search would make the host wait for a GPU, where a whole
    sort is cheap.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    if logits.device.type == "cpu" and logits.shape[-1] > LIKELY_TOKENS:
        likely = logits.topk(LIKELY_TOKENS).values
        if bool(((likely - total).exp().sum(dim=-1) > top_p).all()):
            return _floor_of_sorted(likely, total, top_p)
    return _floor_of_sorted(logits.sort(dim=-1, descending=True).values, total, top_p)


def _floor_of_sorted(ordered: Tensor, total: Tensor, top_p: float) -> Tensor:
    """``ordered`` falls; a token is kept if those before it hold less than ``top_p``."""
    probability = (ordered - total).exp()
    before = probability.cumsum(dim=-1) - probability
    num_kept = (before < top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(-1, (num_kept - 1).clamp(min=0))  # of NaN none is kept

"""When a guide counts, and how much: a pure function of the seed and the step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

from factorlm.config import Config, check

GuideKind = Literal["cosine", "linear"]
GuideVariant = Literal["full", "stochastic"]


@dataclass(frozen=True, kw_only=True)
class GuideSchedule(Config):
    """α over the steps 0 .. num_steps - 1, and the steps that leave the guide out.

    ``cosine``: α(t) = ½(1 + cos(π t / T)), ``linear``: α(t) = 1 - t / T, with T = ``num_steps``;
    0 from T on (arXiv 2407.09835, section 4). ``full`` runs the guide in every step before T,
    ``stochastic`` in step t with probability α(t): the papers' ``reduce_flop``, which halves what
    the guide costs.
    """

    num_steps: int
    """T: the first step in which there is no guide any more."""
    kind: GuideKind = "cosine"
    variant: GuideVariant = "full"
    seed: int = 0
    """Of the choice of steps; it is one for all layers and processes."""

    def __post_init__(self) -> None:
        check(self.num_steps >= 1, f"num_steps={self.num_steps} must be at least 1")
        check(self.kind in get_args(GuideKind), f"kind={self.kind!r} must be cosine or linear")
        known = get_args(GuideVariant)
        check(self.variant in known, f"variant={self.variant!r} must be full or stochastic")

    def alpha_at(self, step: int) -> float:
        """α in step ``step`` (0-based)."""
        if step >= self.num_steps:
            return 0.0
        done = step / self.num_steps
        return 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def is_guided(self, step: int) -> bool:
        """Whether step ``step`` runs the guide. The draw depends on (seed, step) alone."""
        if step >= self.num_steps:
            return False
        return self.variant == "full" or _uniform(self.seed, step) < self.alpha_at(step)

    @property
    def expected_guided_steps(self) -> float:
        """How many steps run the guide, on average over seeds: the sum of their chances."""
        if self.variant == "full":
            return float(self.num_steps)
        return math.fsum(self.alpha_at(step) for step in range(self.num_steps))


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that is the same on every machine."""
    digest = hashlib.blake2b(f"guide/{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64

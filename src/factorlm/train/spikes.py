"""Loss spikes: when the loss is far over those before it, and in which module that shows.

A guard that only tells: nothing here changes what is learned.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from factorlm.distributed import World
from factorlm.layers import saved_name

WINDOW = 128
"""Steps before a step that its loss is compared with."""
MIN_HISTORY = 32
"""So many at least."""
SIGMAS = 6.0
"""Standard deviations over their mean that make a spike."""
WEIGHT_JUMP = 2.0
"""Growth of a module's weights that training does not bring about in ``WINDOW`` steps."""
SAMPLE_STEPS = 16
"""Steps between samples of the modules' norms."""


@dataclass(frozen=True)
class Spike:
    """The first step of a spike."""

    loss: float
    mean: float
    """Of the losses before it."""
    sigma: float


class LossHistory:
    """The last ``WINDOW`` losses."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._is_high = False
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> Spike | None:
        """Take in the loss of the next step; the spike, if one begins with it.

        Further steps over the limit belong to the same spike.
        """
        spike = self._spike_of(loss)
        begins = spike is not None and not self._is_high
        self._is_high = spike is not None
        self._losses.append(loss)
        return spike if begins else None

    def _spike_of(self, loss: float) -> Spike | None:
        if len(self._losses) < MIN_HISTORY:
            return None
        before = np.array(self._losses)
        mean, sigma = float(before.mean()), float(before.std())
        return Spike(loss, mean, sigma) if loss > mean + SIGMAS * sigma else None


@dataclass(frozen=True)
class ModuleNorms:
    """Norms of the gradients and weights of the modules, in one step."""

    owners: tuple[str, ...]
    """The module of every parameter that has a gradient, as files name it; a guide that is left
    out of the step has none."""
    norms: Tensor
    """(number of parameters, 2), on the model's device: of the gradient and of the parameter; of
    sharded ones, of this process's part."""
    is_sharded: bool
    grad_scale: float
    """What the gradients have to be multiplied by: clipping divided them."""

    @classmethod
    def of(cls, model: nn.Module, grad_scale: float) -> Self:
        """Read ``model``; nothing waits for the device."""
        found = [(name, p, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        return cls(
            owners=tuple(saved_name(name).rpartition(".")[0] for name, _, _ in found),
            norms=torch.stack([torch.stack([_norm(grad), _norm(p)]) for _, p, grad in found]),
            is_sharded=any(isinstance(p, DTensor) for _, p, _ in found),
            grad_scale=grad_scale,
        )

    def by_module(self, world: World) -> dict[str, tuple[float, float]]:
        """Norm of the gradient, before clipping, and of the weights. Every process has to call."""
        squares = self.norms.double().square()
        if self.is_sharded:
            squares = world.sum_(squares)
        grads: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for module, (grad, weight) in zip(self.owners, squares.tolist(), strict=True):
            grads[module] += grad
            weights[module] += weight
        return {
            module: (self.grad_scale * math.sqrt(grads[module]), math.sqrt(weights[module]))
            for module in grads
        }


class SpikeGuard:
    """Watches the losses of a run, and names the module in which a spike shows most.

    That is the module whose weights' norm has grown most, if it is ``WEIGHT_JUMP`` times its median
    over the last samples; else the one whose gradient's norm has. The gradient alone cannot tell
    two layers in a row apart: if the weights of one grow, the gradients of both do.
    """

    def __init__(self, world: World, losses: Iterable[float] = ()) -> None:
        self._world = world
        self._history = LossHistory(losses)
        self._samples: deque[ModuleNorms] = deque(maxlen=WINDOW // SAMPLE_STEPS)

    def look(self, loss: float) -> Spike | None:
        """Take in the loss of the next step."""
        return self._history.add(loss)

    def wants_sample(self, step: int) -> bool:
        """Whether ``sample`` is due in ``step``; the first one as soon as there is a step."""
        return step % SAMPLE_STEPS == 0 or not self._samples

    def sample(self, norms: ModuleNorms) -> None:
        """Keep ``norms`` as what is usual; nothing waits for the device."""
        self._samples.append(norms)

    def detail(self, spike: Spike, norms: ModuleNorms) -> dict[str, float | str]:
        """What to say of ``spike``, in whose step the norms are ``norms``. Every process has to
        call. Without a sample no ``layer`` is named."""
        said: dict[str, float | str] = dataclasses.asdict(spike)
        growth = self._growth(norms)
        if growth:
            by_weights = max(growth, key=lambda name: growth[name][1])
            by_gradient = max(growth, key=lambda name: growth[name][0])
            jumped = growth[by_weights][1] >= WEIGHT_JUMP
            name = said["layer"] = by_weights if jumped else by_gradient
            said["grad_growth"], said["weight_growth"] = growth[name]
        return said

    def _growth(self, norms: ModuleNorms) -> dict[str, tuple[float, float]]:
        """Of gradient and weights of each module, relative to the medians of the samples."""
        now = norms.by_module(self._world)
        past = [sample.by_module(self._world) for sample in self._samples]
        growth: dict[str, tuple[float, float]] = {}
        for name, (grad, weight) in now.items():
            known = [norms_then[name] for norms_then in past if name in norms_then]
            usual = [statistics.median(values) for values in zip(*known, strict=True)]
            if usual and min(usual) > 0:
                growth[name] = (grad / usual[0], weight / usual[1])
        return growth


def _norm(tensor: Tensor) -> Tensor:
    """Of this process's part, ()."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.linalg.vector_norm(local.detach())

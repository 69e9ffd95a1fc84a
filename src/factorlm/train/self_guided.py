"""The guides of a run: their share, the steps that leave them out, their gradients, their end."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from factorlm.distributed import World
from factorlm.optim import GuideSchedule, release_
from factorlm.surgery import detach_guides_, guided_layers, set_guides_


class Guidance:
    """What the ``Trainer`` does with the guides that its model was built with.

    Everything follows from the step, so a resumed run has nothing to restore.
    """

    def __init__(self, model: nn.Module, schedule: GuideSchedule, world: World) -> None:
        self.schedule = schedule
        self._model = model
        self._world = world
        self._layers = list(guided_layers(model).values())

    def start_step(self, step: int) -> tuple[float, bool]:
        """Set every layer's α for ``step``; α, and whether the step leaves the guides out."""
        return set_guides_(self._layers, self.schedule, step)

    def reduce_gradients(self) -> None:
        """Average the guides' gradients over replicas, which DDP leaves alone: no process waits
        for a gradient that a skipped step does not give. FSDP2 reduces its own."""
        weights = [layer.guide.weight for layer in self._layers]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if self._world.size == 1 or isinstance(self._layers[0].guide, FSDPModule):
            return
        works = [dist.all_reduce(grad, async_op=True) for grad in grads]
        for grad, work in zip(grads, works, strict=True):
            assert work is not None
            work.wait()
            grad /= self._world.size

    def end(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the guides off, with their gradients and their optimizer state."""
        guides = [layer.guide for layer in self._layers]
        release_(optimizer, detach_guides_(self._model))
        for guide in guides:
            forget_unit(module, guide)
            guide.weight.grad = None
        self._layers = []


def forget_unit(module: nn.Module, unit: nn.Module) -> None:
    """Drop the references that FSDP2's root ``module`` keeps to ``unit``, which is gone from it;
    without this its weight would stay in memory. Nothing to do without FSDP2."""
    if not isinstance(module, FSDPModule) or not isinstance(unit, FSDPModule):
        return
    context = module._get_fsdp_state()._state_ctx
    state = unit._get_fsdp_state()
    context.all_states = [other for other in context.all_states if other is not state]

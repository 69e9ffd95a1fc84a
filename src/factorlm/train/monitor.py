"""What optimizer steps do to the structured layers, every so many steps; and the spike guard."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from factorlm.distributed import World
from factorlm.layers import StructuredLinear, saved_name
from factorlm.layers.spectrum import product_change, product_rms, spectral_norm
from factorlm.optim.matrix import whole
from factorlm.records import LOSS_SPIKE, EventRecord, LayerValues, MonitorRecord
from factorlm.train.spikes import ModuleNorms, SpikeGuard


class Monitor:
    """Looks at a model before and after each update; it changes nothing that is learned.

    Every process has to call both methods in every step: sharded factors are gathered, one at a
    time. In a monitored step a copy of the structured layers' own shards is held for the time of
    the update, when the activations are gone.
    """

    def __init__(
        self,
        model: nn.Module,
        every_steps: int | None,
        world: World,
        *,
        max_grad_norm: float = float("inf"),
        losses: Iterable[float] = (),
    ) -> None:
        """``max_grad_norm`` is what gradients are clipped to; ``losses`` those of earlier steps."""
        self._model = model
        self._every = every_steps
        self._max_grad_norm = max_grad_norm
        self._world = world
        self._guard = SpikeGuard(world, losses)
        self._layers = {
            saved_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, StructuredLinear)
        }
        self._step = 0
        self._spike: EventRecord | None = None
        self._norms: ModuleNorms | None = None
        self._before: dict[str, list[Tensor]] | None = None

    def before_update(self, step: int, loss: float, grad_norm: float) -> None:
        """With the clipped gradients of step ``step`` (1-based) in place; ``grad_norm`` is their
        norm before."""
        self._step = step
        spike = self._guard.look(loss)
        is_due = self._every is not None and step % self._every == 0 and bool(self._layers)
        wants_sample = spike is None and self._guard.wants_sample(step)
        if spike is None and not is_due and not wants_sample:
            return
        # What clip_grad_norm_ multiplied by is min(1, max_norm / (norm + 1e-6)).
        norms = ModuleNorms.of(self._model, max(1.0, (grad_norm + 1e-6) / self._max_grad_norm))
        if spike is not None:
            detail = self._guard.detail(spike, norms)
            self._spike = EventRecord(event=LOSS_SPIKE, step=step, detail=dict(detail))
        if wants_sample:
            self._guard.sample(norms)
        if is_due:
            self._norms = norms
            self._before = {
                name: [factor.detach().clone() for factor in _factors(layer)]
                for name, layer in self._layers.items()
            }

    def after_update(
        self, guide_alpha: float | None
    ) -> tuple[EventRecord | None, MonitorRecord | None]:
        """The loss spike that began with this step, and the record that is due."""
        spike, self._spike = self._spike, None
        if self._before is None or self._norms is None:
            return spike, None
        norms = self._norms.by_module(self._world)
        layers = {
            name: _values(layer, self._before.pop(name), norms.get(name, (0.0, 0.0))[0])
            for name, layer in self._layers.items()
        }
        self._before = self._norms = None
        return spike, MonitorRecord(step=self._step, guide_alpha=guide_alpha, layers=layers)


def _factors(layer: StructuredLinear) -> list[Tensor]:
    """As the optimizer holds them, in order of application."""
    return [layer.get_parameter(factor.name) for factor in layer.factors]


@torch.no_grad()
def _values(layer: StructuredLinear, before: list[Tensor], grad_norm: float) -> LayerValues:
    old = [whole(factor).double() for factor in before]
    new = [whole(factor).double() for factor in _factors(layer)]
    products = layer.products(*new)
    change = product_change(layer.products(*old), products)
    norms = [spectral_norm(factor) for factor in new]
    found = torch.stack([*norms, product_rms(products), product_rms(change)]).tolist()
    names = [factor.name for factor in layer.factors]
    return LayerValues(
        factor_norms=dict(zip(names, found, strict=False)),
        product_rms=found[-2],
        change_rms=found[-1],
        grad_norm=grad_norm,
    )

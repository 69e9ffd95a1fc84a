"""No step is timed before it is right: its loss and gradients, against dense weights in float32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorlm.bench.cases import require_close
from factorlm.bench.options import DTYPES
from factorlm.bench.truth import TOLERANCES, spread_places
from factorlm.hf.loss import CausalLMLoss
from factorlm.layers import StructuredLinear
from factorlm.ops.cross_entropy import IGNORE_INDEX
from factorlm.surgery import densify_

NUM_CHECKED = 130
"""Tokens whose loss counts, at least: also alone they are more than the ops call few."""
STEP_TOLERANCES = {"fp32": TOLERANCES[torch.float32], "bf16": 0.05, "fp16": 0.01}
"""Largest relative error of the loss and, in Frobenius norm, of a gradient. Under autocast the
errors of all layers add up."""


class TrueStep:
    """What a training step has to give: loss and gradients of the dense twin, in float32.

    The loss is that of sequences from the first to the last of a batch, the others' is ignored:
    the step that is timed takes them all, and may choose its path by their number.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Of ``model`` with the tokens ``ids`` (B, T + 1), the last of which is only predicted."""
        length = ids.shape[1] - 1
        count = min(len(ids), max(2, -(-NUM_CHECKED // length)))
        self._ids, self._rows = ids, spread_places(len(ids), count, ids.device)
        self._wanted = self._true_values(model)

    def check(self, name: str, model: PreTrainedModel, dtype: str) -> None:
        """The whole batch at once, as it is timed. Raises ``NumericError`` naming what differs."""
        labels = torch.full_like(self._ids[:, 1:], IGNORE_INDEX)
        labels[self._rows] = self._ids[self._rows, 1:]
        self._compare(name, model, self._ids[:, :-1], labels, dtype)

    def check_alone(self, name: str, model: PreTrainedModel) -> None:
        """The sequences that count, without the others, in float32."""
        chosen = self._ids[self._rows]
        self._compare(name, model, chosen[:, :-1], chosen[:, 1:], "fp32")

    def _compare(
        self, name: str, model: PreTrainedModel, inputs: Tensor, labels: Tensor, dtype: str
    ) -> None:
        found = {"loss": loss_backward(model, inputs, labels, dtype)} | _gradients(model)
        for what, truth in self._wanted.items():
            error = torch.linalg.vector_norm(found[what] - truth) / torch.linalg.vector_norm(truth)
            require_close(f"{name}: {what} in {dtype}", float(error), STEP_TOLERANCES[dtype])
        model.zero_grad(set_to_none=True)

    def _true_values(self, model: PreTrainedModel) -> dict[str, Tensor]:
        twin, chosen = dense_twin(model), self._ids[self._rows]
        loss = loss_backward(twin, chosen[:, :-1], chosen[:, 1:], "fp32")
        return {"loss": loss} | _true_gradients(model, twin)


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` in float32 that multiplies by ``to_dense``: the naive truth."""
    twin = copy.deepcopy(model).to(torch.float32)
    if structured_layers(twin):
        densify_(twin)
    return twin


def structured_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    """The structured layers of ``model`` by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }


def loss_backward(model: PreTrainedModel, inputs: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """The summed loss of inputs and labels (B, T), in training mode, under autocast where
    ``dtype`` is not fp32; gradients are left in the parameters."""
    model.train()
    loss = autocast_loss(CausalLMLoss(model), inputs, labels, dtype)
    loss.backward()
    return loss.detach()


def autocast_loss(loss: CausalLMLoss, inputs: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """What ``loss`` gives under the autocast that a step in ``dtype`` is timed with."""
    with torch.autocast(inputs.device.type, dtype=DTYPES[dtype], enabled=dtype != "fp32"):
        value: Tensor = loss(inputs, labels)
    return value


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the embedding, which have passed every layer, and of the parameters of structured ones."""
    found = {EMBEDDING: model.get_input_embeddings().weight.grad}
    for place, layer in structured_layers(model).items():
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            found[_label(place, name)] = parameter.grad
    return found


def _true_gradients(model: PreTrainedModel, twin: PreTrainedModel) -> dict[str, Tensor]:
    """The same from the gradients of ``twin``: a dense weight's, through ``to_dense``."""
    found = {EMBEDDING: twin.get_input_embeddings().weight.grad}
    for place, layer in structured_layers(model).items():
        dense = twin.get_submodule(place)
        factors = {one.name: layer.get_parameter(one.name) for one in layer.factors}
        slopes = torch.autograd.grad(layer.to_dense(), [*factors.values()], dense.weight.grad)
        found |= {_label(place, name): one for name, one in zip(factors, slopes, strict=True)}
        if layer.bias is not None:
            found[_label(place, "bias")] = dense.bias.grad
    return found


EMBEDDING = "gradient of the embedding"


def _label(place: str, name: str) -> str:
    return f"gradient of {place}.{name}"

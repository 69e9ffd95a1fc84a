"""A causal LM as one module from token ids to its summed loss, the head applied in chunks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from factorlm.ops.cross_entropy import CHUNK_ELEMENTS, IGNORE_INDEX, linear_cross_entropy


class CausalLMLoss(nn.Module):
    """Wraps a causal LM for training: ``forward`` gives the summed cross entropy in nats.

    Where the model's head is a linear map, scaled or soft-capped as its config says, the logits
    of (batch, time, vocabulary) never exist at once. Whether that is so is tried out on the
    model's own code (``head_matches``), not looked up; a head that does something else is run as
    it is. ``chunked`` tells which.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        super().__init__()
        self.model = model
        self.chunk_elements = chunk_elements
        self.scale, self.softcap = head_transform(model.config)
        self.chunked = head_matches(model)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """``input_ids`` and ``labels`` (B, T), labels already shifted: nats, a float32 scalar.

        Labels of -100 are not predicted.
        """
        if not self.chunked:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            flat = logits.flatten(0, 1).float()
            return functional.cross_entropy(
                flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            head.bias,
            labels.flatten(),
            scale=self.scale,
            softcap=self.softcap,
            chunk_elements=self.chunk_elements,
        )


def head_transform(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) of the logits, from the config fields that transformers' families use.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite),
    ``final_logit_softcapping`` caps (Gemma 2). Only a hint: ``head_matches`` decides.
    """
    fields = config.to_dict()
    scale = (fields.get("logit_scale") or 1.0) / (fields.get("logits_scaling") or 1.0)
    return float(scale), fields.get("final_logit_softcapping")


class _Fixed(nn.Module):
    """Stands in for a base model, or for the part of it that the head's code calls (OPT's
    ``model.decoder``): returns given hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.hidden)


class _Output:
    """What a base model returns, as far as heads read it: hidden states, all else None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def head_matches(model: PreTrainedModel) -> bool:
    """Whether the model's own code from last hidden states to logits is the linear head with
    ``head_transform``.

    Tried with the base model replaced by fixed hidden states and the head by a small one, of a
    size at which a cap or a scale shows. Any failure to try means no.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, head.in_features, generator=generator)
    weight = torch.randn(64, head.in_features, generator=generator) * 20 / head.in_features**0.5
    try:
        probe = _probe(model, hidden, weight)
        logits = probe(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits
    except Exception:
        return False
    scale, softcap = head_transform(model.config)
    expected = scale * (hidden @ weight.t())
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    return logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-4)


def _probe(model: PreTrainedModel, hidden: Tensor, weight: Tensor) -> PreTrainedModel:
    """The model's own code over fixed hidden states, with ``weight`` (V, H) as its head.

    A shallow copy: the model itself, on whatever device, is not touched.
    """
    probe = copy.copy(model)
    probe._modules = dict(model._modules)
    probe._modules[model.base_model_prefix] = _Fixed(hidden)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight.copy_(weight)
    probe.set_output_embeddings(head)
    return probe

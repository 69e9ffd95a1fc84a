"""Logits of the next token: once for the prompts, then token by token.

Three ways, of which a ``Decoder`` chooses: over a cache; replayed from a CUDA graph (``graph.py``);
over the whole sequence each time, for models whose state is of another kind.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel

from factorlm.inference.cache import StaticKVCache, new_cache


class Steps(ABC):
    """One batch of left-padded sequences on its way through a model."""

    max_length: int
    """Tokens that fit in a row, padding included."""

    @abstractmethod
    def prefill(self, ids: Tensor, num_pads: Tensor | None) -> Tensor:
        """Begin with prompts (B, N); the first ``num_pads`` (B,) of a row are padding; None: no
        row has any. Returns the logits of the next token, (B, V)."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token (B,) to each row. Returns the logits of the next, (B, V), valid until
        the next call."""

    def is_current(self) -> bool:
        """Whether these steps are those of the model as it is. Asked before a generation; where
        they are not, new ones are needed."""
        return True


class LastLogits:
    """Calls a model for the logits of the last position, with the arguments that it takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        names = inspect.signature(model.forward).parameters
        self._model = model
        self._takes_positions = "position_ids" in names
        self._always = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def __call__(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None
    ) -> Tensor:
        """(B, V) from ids (B, N), mask (B, tokens so far) or None, positions (1 or B, N)."""
        given: dict[str, object] = dict(self._always)
        if self._takes_positions:
            given["position_ids"] = positions
        if cache is not None:
            given["past_key_values"] = cache
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=cache is not None,
            return_dict=True,
            **given,
        ).logits
        return logits[:, -1]


class Layout:
    """Positions and padding mask of a whole generation, made once: steps take views.

    Without padding there is no mask, and attention needs none for a single new token.
    """

    def __init__(self, length: int, num_pads: Tensor | None, device: torch.device) -> None:
        self.positions = torch.arange(length, device=device).unsqueeze(0)
        self.mask: Tensor | None = None
        if num_pads is not None:
            shifted = self.positions - num_pads.unsqueeze(1)
            self.mask = (shifted >= 0).long()
            self.positions = shifted.clamp(min=0)

    def part(self, start: int, end: int) -> tuple[Tensor | None, Tensor]:
        """(mask, positions) of a call that computes the tokens from ``start`` to ``end``."""
        mask = None if self.mask is None else self.mask[:, :end]
        return mask, self.positions[:, start:end]


class CachedSteps(Steps):
    """Each token is computed once; a cache keeps what later ones need of it.

    Rotary embeddings that change with the length (``longrope``) make all keys anew at the token
    that changes them, as Hugging Face does.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.max_length = max_length
        self._config, self._device = model.config, model.device
        self._logits = LastLogits(model)
        self._cache = new_cache(self._config, max_length)
        self.is_static = isinstance(self._cache, StaticKVCache)
        """The cache keeps plain keys and values, in memory that is allocated once."""
        self._change_at = _rope_change(model.config.get_text_config())
        self._ids = torch.empty(0)
        self._num_done = 0

    def prefill(self, ids: Tensor, num_pads: Tensor | None) -> Tensor:
        """See ``Steps``."""
        self._layout = Layout(self.max_length, num_pads, self._device)
        self._ids = ids
        return self._restart()

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Steps``."""
        ids = tokens.unsqueeze(1)
        if self._change_at is not None:
            self._ids = torch.cat([self._ids, ids], dim=1)
            if self._num_done == self._change_at:
                return self._restart()
        return self._run(ids)

    def _restart(self) -> Tensor:
        if isinstance(self._cache, StaticKVCache):
            self._cache.reset()
        else:  # other caches cannot all be reset
            self._cache = new_cache(self._config, self.max_length)
        self._num_done = 0
        return self._run(self._ids)

    def _run(self, ids: Tensor) -> Tensor:
        start, end = self._num_done, self._num_done + ids.shape[1]
        self._num_done = end
        return self._logits(ids, *self._layout.part(start, end), self._cache)


class WholeSteps(Steps):
    """The whole sequence at every token: slow, and right for every model. Takes no padding."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.max_length = max_length
        self._layout = Layout(max_length, None, model.device)
        self._logits = LastLogits(model)
        self._ids = torch.empty(0)

    def prefill(self, ids: Tensor, num_pads: Tensor | None) -> Tensor:
        """See ``Steps``."""
        assert num_pads is None
        self._ids = ids
        return self._run()

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Steps``."""
        self._ids = torch.cat([self._ids, tokens.unsqueeze(1)], dim=1)
        return self._run()

    def _run(self) -> Tensor:
        return self._logits(self._ids, *self._layout.part(0, self._ids.shape[1]), None)


class SeparateSteps(Steps):
    """Rows of one length go through the model together, others one by one over the whole sequence.

    For models with a state of their own: not every one of them leaves padding out of it, and some
    keep it in their modules, where there is place for one batch.
    """

    def __init__(self, model: PreTrainedModel, together: Steps) -> None:
        self.max_length = together.max_length
        self._model, self._together = model, together
        self._used: list[Steps] = [together]

    def prefill(self, ids: Tensor, num_pads: Tensor | None) -> Tensor:
        """See ``Steps``."""
        self._used = [self._together]
        parts = [ids]
        if num_pads is not None:
            counts = num_pads.tolist()
            parts = [ids[row : row + 1, count:] for row, count in enumerate(counts)]
            self._used = [WholeSteps(self._model, self.max_length) for _ in parts]
        pairs = zip(self._used, parts, strict=True)
        return torch.cat([steps.prefill(part, None) for steps, part in pairs])

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Steps``."""
        pairs = zip(self._used, tokens.chunk(len(self._used)), strict=True)
        return torch.cat([steps.step(part) for steps, part in pairs])


def plain_steps(model: PreTrainedModel, max_length: int) -> Steps:
    """The fastest steps that need no CUDA graph and are right for ``model``."""
    if not takes_cache(model):
        return SeparateSteps(model, WholeSteps(model, max_length))
    steps = CachedSteps(model, max_length)
    return steps if steps.is_static else SeparateSteps(model, steps)


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether ``forward`` goes on from a Hugging Face ``Cache`` with no help of its own class.

    A class that prepares its inputs for generation itself may need more than a cache, unless it
    is marked as fit for compilation, where only tensors and a cache can be given.
    """
    own = type(model).prepare_inputs_for_generation
    plain = own is GenerationMixin.prepare_inputs_for_generation or model._can_compile_fullgraph
    named = "past_key_values" in inspect.signature(model.forward).parameters
    return plain and named and model._supports_default_dynamic_cache()


def _rope_change(config: PretrainedConfig) -> int | None:
    """Number of tokens after which rotary embeddings are others; None: they stay the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = rope.get("original_max_position_embeddings")
    return original or getattr(config, "original_max_position_embeddings", None)

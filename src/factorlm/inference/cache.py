"""The keys and values of the tokens so far, in memory that is allocated once.

Hugging Face's growing cache copies all keys and values for every new token. This one writes the
new ones in place and hands attention a view of the part that is filled. The heads are those that
the model stores: grouped queries share them, nothing is repeated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class StaticKVLayer(DynamicLayer):
    """Keys and values of one layer, each (batch, kv heads, max length, head dim).

    Memory is allocated at the first token, when its dtype and sizes are known. With
    ``sliding_window`` attention sees no more of the past than the window, as in Hugging Face's
    sliding layers; the buffer keeps all positions, so that nothing is ever moved.
    """

    def __init__(self, max_length: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.num_filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors like these, (batch, kv heads, *, head dim)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], self.max_length, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, kv heads, N, head dim); return views of what the N tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, start = key_states.shape[-2], self.num_filled
        self.keys.narrow(2, start, count).copy_(key_states)
        self.values.narrow(2, start, count).copy_(value_states)
        length, offset = self.get_mask_sizes(count)
        self.num_filled = start + count
        return self.keys.narrow(2, offset, length), self.values.narrow(2, offset, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that the next ``query_length`` tokens get."""
        offset = 0
        if self.sliding_window is not None:
            offset = max(self.num_filled - self.sliding_window + 1, 0)
        return self.num_filled + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.num_filled

    def get_max_length(self) -> int:
        """Number of tokens that fit."""
        return self.max_length

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.num_filled = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (negative, as in Hugging Face's caches)."""
        assert tokens_to_remove <= 0
        self.num_filled = max(self.num_filled + tokens_to_remove, 0)


class StaticKVCache(Cache):
    """One ``StaticKVLayer`` a decoder layer, for a batch of fixed size."""

    def __init__(self, layers: list[StaticKVLayer]) -> None:
        super().__init__(layers=layers)
        self._is_sliding = [layer.is_sliding for layer in layers]
        self._none = [False] * len(layers)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer; see ``StaticKVLayer.update``."""
        return self.layers[layer_idx].update(key_states, value_states)

    # Models ask for the three lists at every token; the base class builds them anew.

    @property
    def is_sliding(self) -> list[bool]:
        """Of each layer: whether it has a sliding window."""
        return self._is_sliding

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer: whether it has a recurrent state. None has."""
        return self._none

    @property
    def is_dummy(self) -> list[bool]:
        """Of each layer: whether it keeps nothing. All keep something."""
        return self._none


def new_cache(config: PretrainedConfig, max_length: int) -> Cache:
    """An empty cache for a model of ``config`` and up to ``max_length`` tokens a row.

    A ``StaticKVCache`` where every layer keeps plain keys and values, with a sliding window or
    without; else (recurrent states, shared layers, indexers) the cache that Hugging Face makes.
    """
    usual = DynamicCache(config=config)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in usual.layers):
        return usual
    windows = [
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for layer in usual.layers
    ]
    return StaticKVCache([StaticKVLayer(max_length, window) for window in windows])

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from factorlm.inference.cache import StaticKVCache, StaticKVLayer, new_cache
from factorlm.testing.models import TINY_CONFIGS

BATCH, HEADS, HEAD_DIM = 2, 3, 4


def states(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, HEADS, count, HEAD_DIM, generator=generator)
    return keys, values


@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("counts", [[5, 1, 1, 1], [1] * 9, [2, 3, 4]], ids=str)
def test_layer_gives_what_hugging_faces_gives(window: int | None, counts: list[int]) -> None:
    usual = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    layer = StaticKVLayer(12, window)
    for seed, count in enumerate(counts):
        assert layer.get_mask_sizes(count) == usual.get_mask_sizes(count)
        found, expected = layer.update(*states(count, seed)), usual.update(*states(count, seed))
        assert all(map(torch.equal, found, expected))
        assert layer.get_seq_length() == usual.get_seq_length()
    assert layer.is_sliding == usual.is_sliding


def test_memory_is_allocated_once_and_written_in_place() -> None:
    layer = StaticKVLayer(12)
    layer.update(*states(5, 0))
    assert layer.keys.shape == layer.values.shape == (BATCH, HEADS, 12, HEAD_DIM)
    where = layer.keys.data_ptr(), layer.values.data_ptr()
    for seed in range(7):
        views = layer.update(*states(1, seed))
        assert tuple(view.data_ptr() for view in views) == where
    layer.reset()
    keys, _ = layer.update(*states(12, 8))
    assert keys.data_ptr() == where[0]
    assert torch.equal(keys, states(12, 8)[0])


def test_what_was_cropped_is_written_over() -> None:
    layer, usual = StaticKVLayer(12), DynamicLayer()
    for part in (layer, usual):
        part.update(*states(6, 0))
        part.crop(-2)
    assert layer.get_seq_length() == 4
    assert all(map(torch.equal, layer.update(*states(1, 1)), usual.update(*states(1, 1))))


def test_more_than_fits_is_an_error() -> None:
    layer = StaticKVLayer(4)
    layer.update(*states(4, 0))
    with pytest.raises(RuntimeError):
        layer.update(*states(1, 1))


def test_cache_answers_models_as_hugging_faces_does() -> None:
    config = TINY_CONFIGS["gemma2"]()
    cache, usual = new_cache(config, 8), DynamicCache(config=config)
    assert isinstance(cache, StaticKVCache)
    for name in ("is_sliding", "is_linear", "is_dummy", "is_compileable"):
        assert getattr(cache, name) == getattr(usual, name)
    assert [layer.sliding_window for layer in cache.layers] == [4096, None, 4096]
    for part in (cache, usual):
        part.update(*states(3, 0), 1)
    assert cache.get_seq_length(1) == usual.get_seq_length(1) == 3
    assert cache.get_mask_sizes(2, 1) == usual.get_mask_sizes(2, 1)
    assert cache.get_max_length() == 8


def test_layers_with_another_state_keep_hugging_faces_cache() -> None:
    kinds = ["conv", "full_attention"]
    config = CONFIG_MAPPING["lfm2"](num_hidden_layers=2, layer_types=kinds)
    cache = new_cache(config, 8)
    assert type(cache) is DynamicCache

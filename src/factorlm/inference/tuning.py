"""``tune``: measure when a merged copy is faster than the factors, on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from factorlm.config import check
from factorlm.inference.capture import capture
from factorlm.inference.latency import (
    LatencyTable,
    LayerCase,
    TokenLatency,
    make_cache_folder,
    save_table,
)
from factorlm.layers import MergePolicy, PreMergedLinear, StructuredLinear
from factorlm.measure import Measurement, measure_latency, synchronizer

MAX_TOKENS = 8192
TURNING_BYTES = 256 * 2**20
"""As many layers of a case take turns as hold this much in merged copies, at least one."""

Measure = Callable[..., Mapping[str, Measurement]]


def tune(
    model: nn.Module,
    *,
    max_tokens: int = MAX_TOKENS,
    measure: Measure = measure_latency,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[LayerCase, LatencyTable]:
    """Measure every distinct structured layer of ``model``, and keep the tables in the cache.

    With 1, 2, 4, ... tokens up to ``max_tokens``; the factors and the merged copy take turns
    (``factorlm.measure.measure_latency``). Layers of one case take turns too, so that the
    processor's caches do not hold weights that decoding would have to fetch. On CUDA these layers
    are one graph, in which no launch from Python counts, as in a step of decoding. Each table is
    saved as soon as it is there: what was measured before an interruption is not lost.

    Args:
        measure: called as ``measure_latency`` is.
        on_progress: called with (token counts measured, token counts in all).

    Layers whose merged copy would be no other matrix (``dense``) are left out. Raises
    ``ConfigError`` if there is no other structured layer, and ``StorageError`` if the cache cannot
    be written.
    """
    check(max_tokens >= 1, f"max_tokens={max_tokens} must be at least 1")
    cases = structured_cases(model)
    check(bool(cases), f"{type(model).__name__} has no structured layer: there is nothing to tune")
    make_cache_folder()  # what cannot be kept is not measured for minutes first
    counts = [2**power for power in range(max_tokens.bit_length())]
    total = len(cases) * len(counts)
    tables: dict[LayerCase, LatencyTable] = {}
    for case, layers in cases.items():
        chosen = layers[: max(1, TURNING_BYTES // case.copy_bytes)]
        rows = []
        for count in counts:
            rows.append(_measure(chosen, count, measure))
            on_progress(len(tables) * len(counts) + len(rows), total)
        tables[case] = LatencyTable(tuple(rows))
        save_table(case, tables[case])
    return tables


def structured_cases(model: nn.Module) -> dict[LayerCase, list[StructuredLinear]]:
    """The structured layers of ``model`` by what decides their time, without ``dense`` ones."""
    cases: dict[LayerCase, list[StructuredLinear]] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            case = LayerCase.of(module)
            check(case.device_type != "meta", "the model is on the meta device: load it first")
            if case.has_factors:
                cases.setdefault(case, []).append(module)
    return cases


@torch.inference_mode()
def _measure(layers: list[StructuredLinear], num_tokens: int, measure: Measure) -> TokenLatency:
    """Both forms as ``PreMergedLinear`` runs them, its own overhead included."""
    like = layers[0].get_parameter(layers[0].factors[0].name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, layers[0].in_features, generator=generator)
    x = x.to(device=like.device, dtype=like.dtype)
    policies = {"structured": MergePolicy.never(), "merged": MergePolicy.always()}
    timed = {name: _timed(layers, policy, x) for name, policy in policies.items()}
    found = measure(
        {name: one.run for name, one in timed.items()}, synchronize=synchronizer(like.device)
    )
    return _latency(num_tokens, found, {name: one.num_layers for name, one in timed.items()})


def _latency(
    num_tokens: int, found: Mapping[str, Measurement], num_layers: Mapping[str, int]
) -> TokenLatency:
    """Of one layer, where a call that was timed runs ``num_layers``."""
    return TokenLatency(
        num_tokens=num_tokens,
        structured_ms=found["structured"].median_ms / num_layers["structured"],
        merged_ms=found["merged"].median_ms / num_layers["merged"],
        noise_ms=max(found[name].spread_ms / count for name, count in num_layers.items()),
    )


class _Timed(NamedTuple):
    run: Callable[[], torch.Tensor]
    num_layers: int
    """That one call runs."""


def _timed(layers: list[StructuredLinear], policy: MergePolicy, x: torch.Tensor) -> _Timed:
    """What runs the next of ``layers``, on CUDA all of them from a graph. Their copies are made
    before it is called."""
    wrapped = [PreMergedLinear(layer, policy) for layer in layers]
    for layer in wrapped:
        layer.training = False  # of the wrapper alone: the model keeps its mode
        layer(x)
    if x.is_cuda:
        return _Timed(capture(partial(_run_all, wrapped, x), x.device), len(wrapped))
    turns = itertools.cycle(wrapped)
    return _Timed(lambda: next(turns)(x), 1)


def _run_all(layers: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """What the last one returns."""
    y = x
    for layer in layers:
        y = layer(x)
    return y

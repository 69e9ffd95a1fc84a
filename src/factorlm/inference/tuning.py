"""``tune``: measure when a merged copy is faster than the factors, on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from factorlm.config import check
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
    processor's caches do not hold weights that decoding would have to fetch. Each table is saved as
    soon as it is there: what was measured before an interruption is not lost.

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
    found = measure(
        {name: _in_turn(layers, policy, x) for name, policy in policies.items()},
        synchronize=synchronizer(like.device),
    )
    structured, merged = found["structured"], found["merged"]
    return TokenLatency(
        num_tokens=num_tokens,
        structured_ms=structured.median_ms,
        merged_ms=merged.median_ms,
        noise_ms=max(structured.spread_ms, merged.spread_ms),
    )


def _in_turn(
    layers: list[StructuredLinear], policy: MergePolicy, x: torch.Tensor
) -> Callable[[], object]:
    """A function that runs the next of ``layers``; their copies are made before it is called."""
    wrapped = [PreMergedLinear(layer, policy) for layer in layers]
    for layer in wrapped:
        layer.training = False  # of the wrapper alone: the model keeps its mode
        layer(x)
    turns = itertools.cycle(wrapped)
    return lambda: next(turns)(x)

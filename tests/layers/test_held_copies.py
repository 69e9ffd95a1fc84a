"""Merged copies in a CUDA graph: which it may read, and when it has to be made anew.

Nothing is captured here. Where a layer asks whether it is, it is told so.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.layers.test_premerged_drops import (
    DROPS_AT_ONCE,
    SEEN_BY_THE_NEXT_CALL,
    inputs,
    premerged,
    truth,
)
from torch.utils.flop_counter import FlopCounterMode

from factorlm.layers import MergePolicy, PreMergedLinear
from factorlm.layers import premerged as premerged_module
from factorlm.layers.copies import HeldCopies, holding_copies

MERGED, FACTORS = 2 * 5 * 6 * 10, 2 * 5 * 3 * (6 + 10)
"""FLOPs of a call."""


@contextmanager
def capturing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(premerged_module, "_is_captured", lambda x: True)
        yield


def captured_flops(layer: PreMergedLinear) -> int:
    """Of what a graph would replay; the result is right."""
    with torch.no_grad(), capturing(), FlopCounterMode(display=False) as counter:
        found = layer(inputs())
    torch.testing.assert_close(found, truth(layer, inputs()))
    return counter.get_total_flops()


def capture(layer: PreMergedLinear, flops: int = MERGED) -> HeldCopies:
    """After a run before it, as a graph is captured."""
    with holding_copies() as copies:
        with torch.no_grad():
            layer(inputs())
        assert captured_flops(layer) == flops
    return copies


def test_a_graph_reads_the_copy_that_the_runs_before_it_made() -> None:
    layer = premerged()
    copies = capture(layer)
    assert copies.are_kept()
    assert copies.are_current()
    assert captured_flops(layer) == FACTORS, "a capture of someone who does not hold it"


def test_where_the_policy_takes_the_factors_so_does_the_graph() -> None:
    layer = PreMergedLinear(
        premerged().structured, MergePolicy(token_counts=(1, 4), merged=(True, False))
    ).eval()
    copies = capture(layer, FACTORS)
    assert not layer.has_copy
    with torch.no_grad():
        layer.structured.V.mul_(2)
    assert copies.are_current(), "a graph reads factors where they lie"


def test_no_copy_is_made_in_a_capture() -> None:
    layer = premerged()
    with holding_copies():
        assert captured_flops(layer) == FACTORS
    assert not layer.has_copy


def test_nor_is_one_read_that_is_no_longer_right() -> None:
    layer = premerged()
    with holding_copies(), torch.no_grad():
        layer(inputs())
        layer.structured.V.mul_(2)
        assert captured_flops(layer) == FACTORS


def test_a_graph_keeps_alive_what_it_reads() -> None:
    layer = premerged()
    copies = capture(layer)
    memory = weakref.ref(layer._merged._copy.kept[0])
    layer.invalidate()
    gc.collect()
    assert memory() is not None
    assert not copies.are_kept()
    del copies
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("name", [*DROPS_AT_ONCE, *SEEN_BY_THE_NEXT_CALL])
def test_every_change_of_a_factor_is_seen(name: str) -> None:
    """At the latest by the question that is asked before a generation."""
    layer = premerged()
    copies = capture(layer)
    (DROPS_AT_ONCE | SEEN_BY_THE_NEXT_CALL)[name](layer)
    assert copies.are_kept() == (name in SEEN_BY_THE_NEXT_CALL)
    assert not copies.are_current()
    with torch.no_grad():
        layer(inputs(layer.structured.V.dtype))
    assert layer.has_copy
    assert not copies.are_kept(), "another copy is not that very one"


def test_hooks_that_came_later_are_seen() -> None:
    layer = premerged()
    copies = capture(layer)
    layer.structured.register_forward_hook(lambda *_: None)
    assert not copies.are_current()


def test_another_threads_capture_is_not_meant() -> None:
    layer = premerged()
    found: list[int] = []
    with torch.no_grad():
        layer(inputs())
    with holding_copies() as copies:
        thread = threading.Thread(target=lambda: found.append(captured_flops(layer)))
        thread.start()
        thread.join()
        assert found == [FACTORS]
        assert captured_flops(layer) == MERGED
    assert len(copies._all) == 1

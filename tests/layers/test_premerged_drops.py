"""What drops a merged copy, and threads that call one layer."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import optimizer as torch_optimizer

from factorlm.layers import LowRankConfig, LowRankLinear, MergePolicy, PreMergedLinear


def premerged() -> PreMergedLinear:
    """A layer in eval mode that takes its copy at any number of tokens, with a random bias."""
    torch.manual_seed(0)
    structured = LowRankConfig(rank=3).build(6, 10, dtype=torch.float64)
    layer = PreMergedLinear(structured, MergePolicy.always())
    with torch.no_grad():
        layer.structured.bias.normal_()
    return layer.eval()


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def truth(layer: PreMergedLinear, x: Tensor) -> Tensor:
    return linear(x, layer.structured.to_dense(), layer.bias)


def train(layer: PreMergedLinear) -> None:
    layer.train()
    assert not layer.has_copy
    layer.structured.V.data.mul_(2)
    layer.eval()


def load(layer: PreMergedLinear) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def load_assign(layer: PreMergedLinear) -> None:
    new = {name: 2 * value for name, value in layer.state_dict().items()}
    nn.ModuleDict({"a": layer}).load_state_dict({f"a.{k}": v for k, v in new.items()}, assign=True)


def to_dtype(layer: PreMergedLinear) -> None:
    layer.structured.V.data.mul_(2)
    nn.Sequential(layer).to(torch.float32)


def to_empty(layer: PreMergedLinear) -> None:
    layer.to_empty(device="cpu").structured.reset_parameters(std=1.0)


def step(kind: type, **options: object) -> Callable[[PreMergedLinear], None]:
    """A step that moves every weight by about its rate."""

    def run(layer: PreMergedLinear) -> None:
        optimizer = kind(layer.parameters(), lr=0.5, **options)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return run


DROPS_AT_ONCE = {
    "train": train,
    "load_state_dict": load,
    "load_state_dict, assigning": load_assign,
    "to(dtype)": to_dtype,
    "to_empty": to_empty,
    "AdamW": step(torch.optim.AdamW),
    "AdamW, foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "SGD": step(torch.optim.SGD),
    "SGD, fused": step(torch.optim.SGD, fused=True),
}


@torch.no_grad()
def in_place(layer: PreMergedLinear) -> None:
    layer.structured.U.mul_(2)


@torch.inference_mode()
def in_place_in_inference_mode(layer: PreMergedLinear) -> None:
    layer.structured.U.mul_(2)


def view(layer: PreMergedLinear) -> None:
    layer.structured.U.detach()[1:].zero_()


def new_parameter(layer: PreMergedLinear) -> None:
    layer.structured.V = nn.Parameter(2 * layer.structured.V.detach())


def new_data(layer: PreMergedLinear) -> None:
    layer.structured.V.data = 2 * layer.structured.V.detach()


def same_memory(layer: PreMergedLinear) -> None:
    transposed = layer.structured.V.detach().as_strided((3, 6), (1, 3))
    layer.structured.V = nn.Parameter(transposed)


def new_strides(layer: PreMergedLinear) -> None:
    layer.structured.V.data = layer.structured.V.data.as_strided((3, 6), (1, 3))


def new_shape(layer: PreMergedLinear) -> None:
    """A lower rank: the same memory, with the same strides."""
    layer.structured.V.data = layer.structured.V.data[:2]
    layer.structured.U.data = layer.structured.U.data[:, :2]


def swapped(layer: PreMergedLinear) -> None:
    torch.utils.swap_tensors(layer.structured.V, nn.Parameter(2 * layer.structured.V.detach()))


def project(layer: PreMergedLinear) -> None:
    layer.structured.project_(torch.eye(10, 6, dtype=torch.float64))


def load_below(layer: PreMergedLinear) -> None:
    structured = layer.structured
    structured.load_state_dict({name: 2 * value for name, value in structured.state_dict().items()})


SEEN_BY_THE_NEXT_CALL = {
    "in place": in_place,
    "in place, inference mode": in_place_in_inference_mode,
    "through a view": view,
    "a new parameter": new_parameter,
    "new data": new_data,
    "a new parameter on the same memory": same_memory,
    "new strides on the same memory": new_strides,
    "a new shape on the same memory": new_shape,
    "swap_tensors": swapped,
    "project_": project,
    "load_state_dict of the structured layer": load_below,
}


@pytest.mark.parametrize("name", [*DROPS_AT_ONCE, *SEEN_BY_THE_NEXT_CALL])
def test_a_changed_factor_is_never_missed(name: str) -> None:
    layer = premerged()
    with torch.no_grad():
        before = layer(inputs())
    assert layer.has_copy
    (DROPS_AT_ONCE | SEEN_BY_THE_NEXT_CALL)[name](layer)
    assert layer.has_copy == (name in SEEN_BY_THE_NEXT_CALL)
    x = inputs(dtype=layer.structured.V.dtype)
    with torch.no_grad():
        after = layer(x)
    assert not torch.allclose(after.double(), before, rtol=0.01)
    torch.testing.assert_close(after, truth(layer, x))
    assert layer.has_copy


def test_a_step_of_any_optimizer_drops_it() -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
    step(torch.optim.SGD)(premerged())
    assert not layer.has_copy


def test_a_duplicate_is_dropped_by_steps_too() -> None:
    layer = copy.deepcopy(premerged())
    with torch.no_grad():
        layer(inputs())
    step(torch.optim.SGD)(premerged())
    assert not layer.has_copy


def test_eval_again_keeps_it() -> None:
    layer = premerged()
    with torch.no_grad():
        layer(inputs())
    assert layer.eval().has_copy


def test_a_write_through_data_needs_invalidate() -> None:
    layer = premerged()
    with torch.no_grad():
        before = layer(inputs())
        layer.structured.V.data.mul_(2)
        assert torch.equal(layer(inputs()), before), "PyTorch counts no version here"
        layer.invalidate()
        assert not layer.has_copy
        torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))


def test_an_address_does_not_come_back() -> None:
    """The copy holds the memory that it was computed from, so that no new data can lie there and
    look like the old. The new copy lets it go."""
    layer = premerged()
    memory = np.ones((3, 6))
    held = weakref.ref(memory)
    layer.structured.V.data = torch.from_numpy(memory)
    del memory
    with torch.no_grad():
        layer(inputs())
        layer.structured.V.data = torch.full((3, 6), 2.0, dtype=torch.float64)
        gc.collect()
        assert held() is not None
        torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))
    gc.collect()
    assert held() is None


def test_training_never_takes_it() -> None:
    layer = premerged().train()
    with torch.no_grad():
        layer(inputs())
    assert not layer.has_copy


def test_nothing_outlives_its_layer() -> None:
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    layers = [premerged() for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer(inputs())
    dead = [weakref.ref(layer) for layer in layers]
    dead.append(weakref.ref(layers[0]._merged._copy.kept[0]))
    del layer, layers
    gc.collect()
    assert [ref() for ref in dead] == [None] * 4
    assert len(torch_optimizer._global_optimizer_post_hooks) in (hooks, hooks + 1)
    premerged()
    assert len(torch_optimizer._global_optimizer_post_hooks) in (hooks, hooks + 1)


# Threads -------------------------------------------------------------------------------------


def run_in_threads(function: Callable[[], Tensor], count: int = 8) -> list[Tensor]:
    barrier, results = threading.Barrier(count), []

    def body() -> None:
        barrier.wait()
        results.append(function())

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_many_threads_make_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    to_dense = LowRankLinear.to_dense
    layer = premerged()
    x = inputs()

    def counted(self: LowRankLinear) -> Tensor:
        calls.append(0)
        time.sleep(0.01)  # so that all threads come while the first one is here
        return to_dense(self)

    @torch.no_grad()
    def call() -> Tensor:
        return layer(x)

    monkeypatch.setattr(LowRankLinear, "to_dense", counted)
    for round_ in range(1, 11):
        results = run_in_threads(call)
        assert len(calls) == round_
        wanted = linear(x, to_dense(layer.structured), layer.bias)
        assert len(results) == 8
        for found in results:
            torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            layer.structured.V.mul_(1.5)


def test_a_change_while_a_thread_makes_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the slow thread made of the old factors is not what the next call takes."""
    layer = premerged()
    made, changed = threading.Event(), threading.Event()
    to_dense = LowRankLinear.to_dense

    def slow(self: LowRankLinear) -> Tensor:
        dense = to_dense(self)
        made.set()
        assert changed.wait(timeout=60)
        return dense

    monkeypatch.setattr(LowRankLinear, "to_dense", slow)
    thread = threading.Thread(target=torch.no_grad()(layer), args=(inputs(),))
    thread.start()
    assert made.wait(timeout=60)
    layer.structured.V.data.mul_(2)  # as a fused step does
    layer.invalidate()
    changed.set()
    thread.join()
    monkeypatch.setattr(LowRankLinear, "to_dense", to_dense)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs()), truth(layer, inputs()))

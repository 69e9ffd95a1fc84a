"""The Triton kernel of low_rank on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.inference.capture import capture
from factorlm.ops import low_rank as module
from factorlm.ops.low_rank import low_rank

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
SIZES = [(300, 37, 70), (1, 1, 1), (768, 192, 3072), (3072, 192, 768), (4096, 1024, 11008)]


def operands(
    num_tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, V, U, bias, of which each product has values around 1."""
    width_in, rank, width_out = sizes
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, width_in, generator=draw)
    V = torch.randn(rank, width_in, generator=draw) / width_in**0.5
    U = torch.randn(width_out, rank, generator=draw) / rank**0.5
    bias = torch.randn(width_out, generator=draw)
    x, V, U, bias = (tensor.to("cuda", dtype) for tensor in (x, V, U, bias))
    return x, V, U, bias


def assert_near(found: Tensor, x: Tensor, V: Tensor, U: Tensor, bias: Tensor) -> None:
    truth = linear(linear(x.double(), V.double()), U.double(), bias.double())
    error = torch.linalg.norm(found.double() - truth)
    assert error <= TOLERANCES[x.dtype] * torch.linalg.norm(truth)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 9, 16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_product_and_its_bits(
    num_tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from factorlm.ops.triton_low_rank import fused_low_rank

    x, V, U, bias = operands(num_tokens, sizes, dtype)
    found = fused_low_rank(x, V, U, bias)
    assert_near(found, x, V, U, bias)
    assert_near(fused_low_rank(x, V, U), x, V, U, torch.zeros_like(bias))
    for _ in range(100):
        assert torch.equal(fused_low_rank(x, V, U, bias), found)
    if torch.cuda.get_device_capability() >= (9, 0):
        torch.cuda.synchronize()
        assert torch.equal(fused_low_rank(x, V, U, bias, chained=True), found)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("chained", [False, True])
def test_the_op_takes_the_kernel_and_a_graph_replays_it(
    dtype: torch.dtype, chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many layers in one graph, with a copy and an elementwise kernel between some, many times,
    with new inputs. Parameters let each launch start beside the kernel before it."""
    monkeypatch.setattr(module, "_AGREES", {})
    up, down = (operands(2, sizes, dtype)[1:] for sizes in ((768, 192, 3072), (3072, 192, 768)))
    if chained:
        up, down = ([nn.Parameter(one) for one in factors] for factors in (up, down))
    x, held = torch.zeros(2, 2, 768, device="cuda", dtype=dtype)
    fused, captured = module._fused, []

    def noted(*tensors: Tensor, chained: bool) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            captured.append(chained)
        return fused(*tensors, chained=chained)

    monkeypatch.setattr(module, "_fused", noted)

    def several(x: Tensor) -> Tensor:
        y = x
        for index in range(12):
            y = low_rank(low_rank(y, *up), *down)
            if index % 3 == 1:
                y = held.copy_(y)
            if index % 3 == 2:
                y = y.tanh()
        return y

    with torch.no_grad():
        replay = capture(lambda: several(x))
        assert list(module._AGREES.values()) == [True, True]
        assert captured == 24 * [chained and torch.cuda.get_device_capability() >= (9, 0)]
        for seed in range(50):
            x.copy_(operands(2, (768, 192, 3072), dtype, seed)[0])
            found = replay().clone()
            assert torch.equal(found, several(x))  # by plain launches
        one = low_rank(x, *up)
        assert_near(low_rank(one, *down), one, *down)


def test_streams_beside_each_other() -> None:
    """Launches that overlap have counters of their own."""
    from factorlm.ops.triton_low_rank import fused_low_rank

    inputs = [operands(1, (1024, 256, 4096), torch.bfloat16, seed) for seed in range(4)]
    expected = [fused_low_rank(*one) for one in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(50):
        for one, stream, results in zip(inputs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(fused_low_rank(*one))
    torch.cuda.synchronize()
    for results, value in zip(found, expected, strict=True):
        assert all(torch.equal(result, value) for result in results)


def test_sizes_that_a_graph_meets_first_take_two_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGREES", {})
    x, V, U, bias = operands(2, (256, 48, 512), torch.float32)
    linear(linear(x, V), U, bias)  # cuBLAS allocates what it needs
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = low_rank(x, V, U, bias)
    graph.replay()
    assert not module._AGREES
    assert_near(y, x, V, U, bias)

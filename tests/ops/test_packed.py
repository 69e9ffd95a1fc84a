"""Packed weights against products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from factorlm.measure import has_fast_bf16
from factorlm.ops.packed import can_pack, linear_packed, pack, takes_packed

ONEDNN = torch.backends.mkldnn.is_available()
PACKED = {torch.float32: ONEDNN, torch.bfloat16: ONEDNN and has_fast_bf16("cpu")}
"""What a CPU packs."""
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of a sum, for 1 of its terms' sizes."""
SIZES = [(1, 1), (1, 9), (7, 1), (7, 5), (33, 17), (48, 64), (65, 129)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept(weight: Tensor) -> Tensor:
    """As a layer keeps it: packed where that is possible, which is where it should be."""
    assert can_pack(weight) == PACKED[weight.dtype]
    packed = pack(weight) if can_pack(weight) else weight
    assert packed.is_mkldnn == PACKED[weight.dtype]
    return packed


def worst_error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest distance from the product in float64, for 1 of the sum of its terms' sizes."""
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    size = linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return ((found.double() - linear(x, weight, bias)).abs() / size).max().item()


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_product(
    out_features: int, in_features: int, dtype: torch.dtype, with_bias: bool
) -> None:
    weight = random(out_features, in_features, dtype=dtype)
    bias = random(out_features, dtype=dtype, seed=1) if with_bias else None
    packed = kept(weight)
    for shape in ((), (1,), (3,), (40,), (2, 3), (2, 1, 2, 1, 2)):
        x = random(*shape, in_features, dtype=dtype, seed=2)
        found = linear_packed(x, packed, bias)
        assert found.shape == (*shape, out_features)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert worst_error(found, x, weight, bias) < ERROR[dtype]


def test_the_tolerance_of_float32_tells_it_from_bf16() -> None:
    x, weight = random(4, 129, seed=2), random(65, 129)
    rounded = linear(x.bfloat16().float(), weight.bfloat16().float())
    assert worst_error(rounded, x, weight, None) > 100 * ERROR[torch.float32]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_memory_that_is_not_in_order(dtype: torch.dtype) -> None:
    """Of x, of the weight that is packed, and of the bias."""
    weight = random(5, 7, dtype=dtype).t()
    x = random(6, 10, dtype=dtype, seed=2)[:, ::2]
    shifted = random(31, dtype=dtype, seed=3)[1:].view(6, 5)
    for bias in (random(14, dtype=dtype, seed=1)[::2], random(1, dtype=dtype, seed=1).expand(7)):
        for tokens in (x, x.t().contiguous().t(), x[:1].expand(4, 5), shifted):
            found = linear_packed(tokens, kept(weight), bias)
            assert worst_error(found, tokens, weight, bias) < ERROR[dtype]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    packed = kept(random(7, 5, dtype=dtype))
    for bias in (None, random(7, dtype=dtype)):
        assert linear_packed(random(0, 5, dtype=dtype), packed, bias).shape == (0, 7)
        assert linear_packed(random(2, 0, 5, dtype=dtype), packed, bias).shape == (2, 0, 7)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    weight, x = random(65, 129, dtype=dtype), random(3, 129, dtype=dtype, seed=2)
    found = [linear_packed(x, packed) for packed in (kept(weight), kept(weight)) for _ in range(3)]
    assert all(torch.equal(y, found[0]) for y in found)


def test_a_packed_weight_is_a_copy() -> None:
    weight, x = random(7, 5), random(3, 5, seed=2)
    packed, before = kept(weight), weight.clone()
    weight.zero_()
    assert (worst_error(linear_packed(x, packed), x, before, None) < 1e-6) == ONEDNN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_plain_weight_passes_through(dtype: torch.dtype) -> None:
    x, weight, bias = (random(*s, dtype=dtype).requires_grad_() for s in ((3, 5), (7, 5), (7,)))
    found, wanted = linear_packed(x, weight, bias), linear(x, weight, bias)
    assert torch.equal(found, wanted)
    grads = (torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (found, wanted))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_cannot_be_packed() -> None:
    assert can_pack(random(7, 5)) == ONEDNN
    assert can_pack(random(7, 5, dtype=torch.bfloat16)) == PACKED[torch.bfloat16]
    for dtype in (torch.float64, torch.float16, torch.int8, torch.complex64):
        assert not can_pack(torch.zeros(7, 5, dtype=dtype))
    for shape in ((5,), (2, 7, 5), (), (0, 5), (7, 0)):
        assert not can_pack(torch.zeros(shape))
    assert not can_pack(torch.zeros(7, 5, device="meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*jit.trace.*deprecated")
def test_what_a_packed_weight_does_not_take() -> None:
    """Where ``linear`` refuses, does something else, or is followed by someone."""
    x, weight, bias = random(3, 5), random(7, 5), random(7)
    assert takes_packed(x, weight, bias)
    assert takes_packed(x[0], kept(weight), bias)
    assert takes_packed(x[:0], weight)
    others = [x[:, :4], x.repeat(1, 2), x[:0, :4], x[0, 0], x.double(), x.long(), x.to("meta")]
    others += [x.to_sparse(), torch.nested.nested_tensor([x, x[:2]])]
    assert not any(takes_packed(other, weight, bias) for other in others)
    assert not takes_packed(x, weight, bias.bfloat16())
    for observer in (forward_ad.dual_level, lambda: FlopCounterMode(display=False)):
        with observer():
            assert not takes_packed(x, weight, bias)
    seen = []
    torch.vmap(lambda row: seen.append(takes_packed(row, weight)) or row)(x)
    torch.jit.trace(lambda x: seen.append(takes_packed(x, weight)) or 2 * x, x, check_trace=False)
    assert seen == [False, False]
    assert takes_packed(x, weight, bias)

"""A linear that keeps its weight packed: it is an ``nn.Linear`` in all but how it multiplies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from factorlm.layers import PackedLinear
from factorlm.ops.packed import can_pack

PACKS = can_pack(torch.zeros(2, 2))
"""Whether float32 is packed here; all that is asked of results holds where it is not."""


def plain(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 10, dtype=dtype).eval()


def packed(dtype: torch.dtype = torch.float32) -> PackedLinear:
    """The same layer, with its copy."""
    layer = plain(dtype)
    PackedLinear.pack_(layer)
    with torch.no_grad():
        layer(inputs(dtype))
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(7)).to(dtype)


def assert_right(found: Tensor, layer: nn.Linear, x: Tensor, tolerance: float = 1e-5) -> None:
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    wanted = linear(x.double(), weight, bias)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def takes_copy(layer: PackedLinear, call: Callable[[], Tensor]) -> bool:
    """Whether a write that PyTorch does not count is missed by ``call``."""
    before = call()
    layer.weight.data.mul_(2)
    after = call()
    layer.weight.data.mul_(0.5)
    return torch.equal(before, after)


# What it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.02)],
)
def test_it_computes_the_same(dtype: torch.dtype, tolerance: float, mode: Callable) -> None:
    layer = packed(dtype)
    layer.invalidate()
    packs = can_pack(layer.weight)
    assert packs <= (dtype != torch.float64)
    for other in (mode, torch.no_grad, torch.inference_mode):
        with other():
            found = layer(inputs(dtype))
            assert takes_copy(layer, lambda: layer(inputs(dtype))) == packs
        assert layer.has_copy == packs
        assert found.dtype == dtype
        assert_right(found, layer, inputs(dtype), tolerance)


def test_without_a_bias_and_without_tokens() -> None:
    layer = nn.Linear(6, 10, bias=False).eval()
    PackedLinear.pack_(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs()), inputs() @ layer.weight.T)
        assert layer(inputs()[:, :0]).shape == (2, 0, 10)


def test_the_copy_is_made_once_and_only_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    pack = torch.clone
    monkeypatch.setattr("factorlm.layers.packed.can_pack", lambda weight: True)
    monkeypatch.setattr("factorlm.layers.packed.pack", lambda w: calls.append(0) or pack(w))
    layer = plain()
    PackedLinear.pack_(layer)
    layer(inputs())
    assert not calls
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            layer(inputs())
    assert len(calls) == 1


def linears() -> tuple[nn.Linear, PackedLinear]:
    return plain(), packed()


PLAIN_CALLS: dict[str, Callable[[], AbstractContextManager]] = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", cache_enabled=False),
    "forward-mode derivatives": forward_ad.dual_level,
    "FLOPs are counted": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("name", PLAIN_CALLS)
def test_calls_that_are_those_of_a_linear(name: str) -> None:
    layer = packed()
    with torch.no_grad(), PLAIN_CALLS[name]():
        found, wanted = layer(inputs()), plain()(inputs())
        assert not takes_copy(layer, lambda: layer(inputs()))
    assert torch.equal(found, wanted)
    assert found.dtype == wanted.dtype
    assert found.requires_grad == wanted.requires_grad


def test_derivatives_that_no_grad_leaves_alone() -> None:
    layer = packed()
    with torch.no_grad():
        _, tangent = torch.func.jvp(layer, (inputs(),), (inputs(),))
        torch.testing.assert_close(tangent, linear(inputs(), layer.weight))
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(inputs(), inputs()))
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent)


def test_the_flops_are_those_of_a_linear() -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        packed()(inputs())
    assert counter.get_total_flops() % (2 * 10 * 6 * 10) == 0 < counter.get_total_flops()


@pytest.mark.parametrize("warm", [False, True])
def test_compiled_it_is_a_linear_in_one_graph(warm: bool) -> None:
    torch._dynamo.reset()
    graphs = []
    layer = packed()
    if not warm:
        layer.invalidate()
    compiled = torch.compile(
        layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True
    )
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(inputs()), linear(inputs(), layer.weight, layer.bias))
            layer.weight.data.mul_(2)  # a graph that held the copy would now be wrong
    assert len(graphs) == 1


def test_hooks_are_called() -> None:
    layer = packed()
    with torch.no_grad():
        after = layer.register_forward_hook(lambda *_: torch.zeros(1))
        assert torch.equal(layer(inputs()), torch.zeros(1))
        after.remove()
        before = layer.register_forward_pre_hook(lambda _, args: (3 * args[0],))
        assert_right(layer(inputs()), layer, 3 * inputs())
        before.remove()
        assert_right(layer(inputs()), layer, inputs())


def test_weights_that_are_lent_or_computed() -> None:
    layer = packed()
    with torch.no_grad():
        lent = {"weight": 2 * layer.weight, "bias": layer.bias}
        found = functional_call(layer, lent, (inputs(),))
        torch.testing.assert_close(found, linear(inputs(), lent["weight"], layer.bias))
        parametrize.register_parametrization(layer, "weight", Double())
        torch.testing.assert_close(layer(inputs()), found)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        assert_right(layer(inputs()), layer, inputs())


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x[0, 0],
        lambda x: x.transpose(0, 1),
        lambda x: x[0, ::2],
        lambda x: x[0].to_sparse(),
        lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]).to_padded_tensor(0.0),
    ],
)
def test_inputs_of_all_kinds(convert: Callable[[Tensor], Tensor]) -> None:
    x = convert(inputs())
    with torch.no_grad():
        torch.testing.assert_close(packed()(x), plain()(x))


@pytest.mark.parametrize(
    "x",
    [
        inputs().double(),
        inputs().bfloat16(),
        inputs().long(),
        inputs()[..., :5],
        inputs().repeat(1, 1, 2),
        inputs()[:, :0, :5],
        inputs()[0, 0, 0],
        inputs().to("meta"),
    ],
)
def test_errors_are_those_of_a_linear(x: Tensor) -> None:
    layer = packed()
    with torch.no_grad():
        with pytest.raises(RuntimeError) as wanted:
            plain()(x)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(wanted.value)
        assert_right(layer(inputs()), layer, inputs())


# What drops the copy -------------------------------------------------------------------------


def step(kind: type, **options: object) -> Callable[[PackedLinear], None]:
    def run(layer: PackedLinear) -> None:
        optimizer = kind(layer.parameters(), lr=0.5, **options)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return run


def train(layer: PackedLinear) -> None:
    layer.train()
    layer.weight.data.mul_(2)
    layer.eval()


def to_dtype(layer: PackedLinear) -> None:
    layer.weight.data.mul_(2)
    nn.Sequential(layer).to(torch.float64)


DROPS_AT_ONCE = {
    "train": train,
    "to(dtype)": to_dtype,
    "to_empty": lambda layer: layer.to_empty(device="cpu").reset_parameters(),
    "AdamW": step(torch.optim.AdamW),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
}


def doubled(layer: PackedLinear) -> dict[str, Tensor]:
    return {f"0.{name}": 2 * value for name, value in layer.state_dict().items()}


@torch.inference_mode()
def in_place_in_inference_mode(layer: PackedLinear) -> None:
    layer.weight.mul_(2)


def new_data(layer: PackedLinear) -> None:
    layer.weight.data = 2 * layer.weight.detach()


def new_parameter(layer: PackedLinear) -> None:
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def same_memory(layer: PackedLinear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_strided((10, 6), (1, 10)))


SEEN_BY_THE_NEXT_CALL = {
    "load_state_dict": lambda layer: nn.Sequential(layer).load_state_dict(doubled(layer)),
    "load_state_dict, assigning": lambda layer: nn.Sequential(layer).load_state_dict(
        doubled(layer), assign=True
    ),
    "in place": torch.no_grad()(lambda layer: layer.weight.mul_(2)),
    "in place, inference mode": in_place_in_inference_mode,
    "through a view": lambda layer: layer.weight.detach()[1:].zero_(),
    "new data": new_data,
    "a new parameter": new_parameter,
    "a new parameter on the same memory": same_memory,
    "the bias in place": torch.no_grad()(lambda layer: layer.bias.add_(1)),
}


@pytest.mark.parametrize("name", [*DROPS_AT_ONCE, *SEEN_BY_THE_NEXT_CALL])
def test_a_changed_weight_is_never_missed(name: str) -> None:
    layer = packed()
    assert layer.has_copy == PACKS
    with torch.no_grad():
        before = layer(inputs())
    (DROPS_AT_ONCE | SEEN_BY_THE_NEXT_CALL)[name](layer)
    assert layer.has_copy == (PACKS and name in SEEN_BY_THE_NEXT_CALL)
    x = inputs(layer.weight.dtype)
    with torch.no_grad():
        after = layer(x)
    assert not torch.allclose(after.float(), before, rtol=0.01)
    assert_right(after, layer, x)
    assert layer.has_copy == can_pack(layer.weight)


def test_a_step_of_any_optimizer_drops_it() -> None:
    layer = packed()
    step(torch.optim.SGD)(packed())
    assert not layer.has_copy


def test_a_write_through_data_needs_invalidate() -> None:
    layer = packed()
    with torch.no_grad():
        before = layer(inputs())
        layer.weight.data.mul_(2)
        assert torch.equal(layer(inputs()), before) == PACKS, "PyTorch counts no version here"
        layer.invalidate()
        assert not layer.has_copy
        assert_right(layer(inputs()), layer, inputs())


# What it is for other code -------------------------------------------------------------------


def test_it_is_the_linear_that_it_was() -> None:
    twin, layer = plain(), plain()
    own, module = dict(layer.named_parameters()), layer
    PackedLinear.pack_(layer)
    with torch.no_grad():
        layer(inputs())
    assert module is layer
    assert isinstance(layer, nn.Linear)
    assert {name: id(p) for name, p in layer.named_parameters()} == {n: id(own[n]) for n in own}
    assert list(layer.state_dict()) == list(twin.state_dict()) == ["weight", "bias"]
    assert list(layer.buffers()) == []
    assert str(layer) == "PackedLinear(in_features=6, out_features=10, bias=True)"
    layer.unpack_()
    assert type(layer) is nn.Linear
    assert layer.__dict__.keys() == twin.__dict__.keys()
    assert torch.equal(layer(inputs()), twin(inputs()))


def test_built_as_one() -> None:
    layer = PackedLinear(6, 10, bias=False, dtype=torch.bfloat16).eval()
    assert layer.bias is None
    with torch.no_grad():
        assert layer(inputs(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_it_trains_as_a_linear(kind: type) -> None:
    twin, layer = linears()
    for module in (twin, layer):
        module.train()
        optimizer = kind(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(inputs()).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                module.eval()(inputs())
            module.train()
    for mine, its in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert torch.equal(mine.grad, its.grad)
    with torch.no_grad():
        assert_right(layer.eval()(inputs()), twin, inputs())


def test_a_tied_weight_stays_tied() -> None:
    embedding, head = nn.Embedding(10, 6), nn.Linear(6, 10).eval()
    head.weight = embedding.weight
    PackedLinear.pack_(head)
    with torch.no_grad():
        head(inputs())
        embedding.weight.mul_(2)
        assert_right(head(inputs()), head, inputs())
    assert head.weight is embedding.weight


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_duplicates_have_a_copy_of_their_own(duplicate: Callable) -> None:
    layer = packed()
    other = duplicate(layer)
    assert type(other) is PackedLinear
    assert not other.has_copy
    with torch.no_grad():
        assert torch.equal(other(inputs()), layer(inputs()))
        other.weight.mul_(2)
        assert_right(other(inputs()), other, inputs())
        assert_right(layer(inputs()), layer, inputs())
        layer.train()
        assert not layer.has_copy
        assert other.has_copy == PACKS
    step(torch.optim.SGD)(packed())
    assert not other.has_copy

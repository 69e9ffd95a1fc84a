"""One optimizer with several rules: as PyTorch's own are used, in loops that know no model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from factorlm.errors import ConfigError
from factorlm.optim import RULES, FactorOptimizer
from factorlm.train.state import full, load_optimizer_, optimizer_tensors


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_rules(device: str = "cpu") -> FactorOptimizer:
    """Pairs of factors, of blocks and plain, matrices, vectors; each group by another rule."""
    shapes = {
        "spectron": [(2, 3, 4), (2, 5, 3)],
        "lora_muon": [(3, 4), (5, 3)],
        "muon": [(4, 6), (2, 5, 3)],
        "adamw": [(4,), ()],
    }
    groups = [
        {
            "params": [
                nn.Parameter(draw(shape, 7 + i).to(device)) for i, shape in enumerate(found)
            ],
            "names": [f"{rule}.{i}" for i in range(len(found))],
            "rule": rule,
        }
        for rule, found in shapes.items()
    ]
    return FactorOptimizer(groups, lr=0.01)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def train(optimizer: FactorOptimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters(optimizer)):
            parameter.grad = draw(tuple(parameter.shape), 100 * step + index).to(parameter)
        optimizer.step()


def values(optimizer: FactorOptimizer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters(optimizer)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def trained() -> list[Tensor]:
    """What six steps in one go give."""
    optimizer = all_rules()
    train(optimizer, range(6))
    return values(optimizer)


def copy_values(source: FactorOptimizer, target: FactorOptimizer) -> None:
    with torch.no_grad():
        for old, new in zip(parameters(source), parameters(target), strict=True):
            new.copy_(old)


def test_a_saved_state_dict_goes_on_bit_equally(trained: list[Tensor]) -> None:
    first, second = all_rules(), all_rules()
    train(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    copy_values(first, second)
    train(second, range(3, 6))
    assert_equal(values(second), trained)


def test_the_tensors_of_a_checkpoint_go_on_bit_equally(trained: list[Tensor]) -> None:
    first, second = all_rules(), all_rules()
    train(first, range(3))
    tensors = {name: full(tensor).clone() for name, tensor in optimizer_tensors(first)}
    assert {name.split("|")[1] for name in tensors if name.startswith("spectron.0")} == {
        "momentum_buffer",
        "right_vectors",
    }
    load_optimizer_(second, tensors)
    copy_values(first, second)
    train(second, range(3, 6))
    assert_equal(values(second), trained)


def test_a_bf16_model_goes_on_bit_equally() -> None:
    """PyTorch loads state in the dtype of its parameter."""
    first = all_rules()
    for parameter in parameters(first):
        parameter.data = parameter.data.bfloat16()
    train_bf16(first, range(2))
    second = copy.deepcopy(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    states = zip(optimizer_tensors(first), optimizer_tensors(second), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in states)
    for optimizer in (first, second):
        train_bf16(optimizer, range(2, 4))
    assert_equal(values(first), values(second))


def train_bf16(optimizer: FactorOptimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters(optimizer)):
            parameter.grad = draw(tuple(parameter.shape), 100 * step + index).bfloat16()
        optimizer.step()


def test_without_a_gradient_nothing_moves_nor_is_remembered() -> None:
    optimizer = all_rules()
    before = values(optimizer)
    optimizer.step()
    assert_equal(values(optimizer), before)
    assert not any(optimizer.state.get(parameter) for parameter in parameters(optimizer))
    train(optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    before = values(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(values(optimizer), before)
    assert str(optimizer.state_dict()) == str(kept)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        result = func(*args, **(kwargs or {}))
        if "copy" in str(func):
            tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
            assert len({tensor.device for tensor in tensors}) == 1, f"{func} between devices"
        return result


def test_no_step_waits_for_the_device() -> None:
    optimizer = all_rules()
    train(optimizer, range(1))
    with NoSync(), pytest.raises(AssertionError):
        torch.zeros(()).item()
    with NoSync():
        optimizer.step()


HOST_READS: list[Callable[[Tensor], Any]] = [
    lambda tensor: tensor.cpu(),
    lambda tensor: tensor.tolist(),
    lambda tensor: tensor.numpy(),
    lambda tensor: float(tensor.sum()),
    lambda tensor: torch.zeros(2).copy_(tensor),
]


def test_no_step_copies_from_or_to_the_device() -> None:
    """On meta, which has no values that the host could read. Its first step may send vectors."""
    optimizer = all_rules("meta")
    train(optimizer, range(1))
    for read in HOST_READS:
        with NoSync(), pytest.raises((AssertionError, RuntimeError, TypeError)):
            read(torch.zeros(2, device="meta"))
    with NoSync(), pytest.raises(AssertionError, match="between devices"):
        torch.zeros(2).to("meta")
    with NoSync():
        optimizer.step()


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [(6, 10), (2, 4, 5)])
def test_matrices_reach_the_minimum_of_a_quadratic(rule: str, shape: tuple[int, ...]) -> None:
    target = draw(shape, 1)
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = FactorOptimizer([parameter], lr=0.1, rule=rule)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (parameter - target).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert float(loss.detach()) < 1e-4 * float(target.square().sum())


@pytest.mark.parametrize("rule", ["spectron", "lora_muon"])
def test_pairs_reach_the_minimum_of_a_quadratic_of_their_product(rule: str) -> None:
    target = draw((10, 3), 1) @ draw((3, 8), 2)
    V, U = nn.Parameter(draw((3, 8), 3) / 3), nn.Parameter(draw((10, 3), 4) / 3)
    group = {"params": [V, U], "rule": rule, "weight_decay": 0.0}
    optimizer = FactorOptimizer([group], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (U @ V - target).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert float(loss.detach()) < 1e-4 * float(target.square().sum())


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = FactorOptimizer([parameter], lr=0.1)

    def closure() -> Tensor:
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert float(parameter.detach().max()) < 1


def test_groups_keep_what_they_set_and_get_the_rest_from_their_rule() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = FactorOptimizer([{"params": matrix, "rule": "muon", "momentum": 0.5}], lr=0.2)
    optimizer.add_param_group({"params": (vector,), "lr": 0.1, "rate_multiplier": 3.0})
    first, second = optimizer.param_groups
    assert (first["momentum"], first["weight_decay"], first["lr"]) == (0.5, 0.1, 0.2)
    assert (second["rule"], second["lr"], second["betas"]) == ("adamw", 0.1, (0.9, 0.95))
    assert second["rate_multiplier"] == 3.0


def test_an_unknown_rule_and_a_bad_group_are_refused() -> None:
    optimizer = FactorOptimizer([nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match=r"unknown optimizer rule 'moun'.*Did you mean 'muon'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "rule": "moun"})
    with pytest.raises(ConfigError, match="momentum=2 "):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(2, 2))], "rule": "muon", "momentum": 2}
        )
    assert len(optimizer.param_groups) == 1


def test_the_state_of_other_rules_is_refused() -> None:
    weight = nn.Parameter(draw((4, 6), 0))
    others = (FactorOptimizer([weight]), torch.optim.AdamW([weight]))
    optimizer = FactorOptimizer([weight], rule="muon")
    for other, rule in zip(others, ("adamw", None), strict=True):
        with pytest.raises(ConfigError, match=f"rule='muon' of group 0 .* rule={rule!r}"):
            optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("rule", list(RULES))
def test_sparse_gradients_and_complex_matrices_are_refused(rule: str) -> None:
    V, U = (nn.Parameter(draw(shape, 0)) for shape in ((3, 4), (5, 3)))
    optimizer = FactorOptimizer([V, U], rule=rule)
    V.grad, U.grad = draw((3, 4), 1).to_sparse(), draw((5, 3), 1).to_sparse()
    with pytest.raises(ConfigError, match=f"rule='{rule}' takes no sparse gradients"):
        optimizer.step()
    if rule != "adamw":
        factors = [nn.Parameter(factor.detach().to(torch.complex64)) for factor in (V, U)]
        with pytest.raises(ConfigError, match=r"dtype=torch\.complex64 .* must be real"):
            FactorOptimizer(factors, rule=rule)


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    RULES._entries.pop("sgd", None)


@pytest.mark.usefixtures("registered")
def test_a_rule_of_ones_own_takes_one_class() -> None:
    from factorlm.optim import Rule

    class Sgd(Rule):
        name = "sgd"
        options = {"weight_decay": 0.0, "direction": 1.0}  # noqa: RUF012

        def check_group(self, group: dict[str, Any]) -> None:
            self.check(abs(group["direction"]) == 1, "direction", group["direction"], "must be ±1")

        def update(self, group: dict[str, Any], state: Any) -> None:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] * group["direction"])

        def flops(self, shapes: Any) -> int:
            return 0

    RULES.register("sgd")(Sgd())
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = FactorOptimizer([{"params": [parameter], "rule": "sgd"}], lr=0.5)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == [-0.5, -0.5]
    with pytest.raises(ConfigError, match="direction=2 of a group with rule='sgd' must be ±1"):
        FactorOptimizer([{"params": [parameter], "rule": "sgd", "direction": 2}])

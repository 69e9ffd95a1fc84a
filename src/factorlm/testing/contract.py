"""The battery that every structure passes: inherit ``StructuredLinearContract`` in a pytest file.

    class TestLowRank(StructuredLinearContract):
        cases = [(LowRankConfig(rank=3), 8, 12), (LowRankConfig(rank=1), 5, 3)]

        def best_residual(self, config, weight):  # an independent truth, e.g. by NumPy
            return (numpy.linalg.svd(weight, compute_uv=False)[config.rank :] ** 2).sum()

A structure that is consistent with itself, counts itself rightly and projects optimally passes.
That it is the matrix that you meant is for a test of your own to say.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from factorlm.errors import ConfigError
from factorlm.layers import StructureConfig, StructuredLinear, structure_from_target
from factorlm.testing.distributed import run_distributed

if TYPE_CHECKING:
    import numpy

Case = tuple[StructureConfig, int, int]


def build(case: Case, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> StructuredLinear:
    """The layer of ``case`` with a fixed draw and a bias that is not zero."""
    config, in_features, out_features = case
    layer = config.build(in_features, out_features, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    layer.reset_parameters(generator=generator)
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.randn(out_features, generator=generator))
    return layer


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(module: nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    """The gradients of a fixed random projection of ``output`` in ``x`` and all parameters."""
    cotangent = draw(*output.shape, seed=7).to(output.dtype)
    return list(torch.autograd.grad(output, [x, *module.parameters()], cotangent))


class StructuredLinearContract:
    """Fill ``cases`` (the first one also runs the expensive tests) and ``best_residual``."""

    cases: ClassVar[Sequence[Case]]
    """(config, in_features, out_features): small, odd and rectangular sizes, every option."""

    def best_residual(self, config: StructureConfig, weight: numpy.ndarray) -> float:
        """‖W − nearest‖² in Frobenius norm of the best approximation of ``weight`` (O, I)."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests that take ``case`` run for each, those that take ``first_case`` for the first."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=[_name(case) for case in self.cases])
        if "first_case" in metafunc.fixturenames:
            metafunc.parametrize("first_case", self.cases[:1], ids=[_name(self.cases[0])])

    # --- the map ---

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3)], ids=str)
    def test_forward_is_the_dense_product(
        self, case: Case, leading: tuple[int, ...], bias: bool
    ) -> None:
        layer = build(case, bias=bias)
        x = draw(*leading, case[1])
        expected = x @ layer.to_dense().T
        if layer.bias is not None:
            expected = expected + layer.bias
        assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    def test_forward_reads_any_strides(self, case: Case) -> None:
        layer = build(case)
        x = draw(case[1], 4, 6).permute(2, 1, 0)[::2]
        assert_close(layer(x), layer(x.contiguous()), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("tokens", [0, 5])
    def test_gradients_are_those_of_the_dense_path(self, case: Case, tokens: int) -> None:
        layer = build(case)
        x = draw(tokens, case[1]).requires_grad_()
        dense = torch.nn.functional.linear(x, layer.to_dense(), layer.bias)
        expected = gradients(layer, x, dense)
        for actual, wanted in zip(gradients(layer, x, layer(x)), expected, strict=True):
            assert_close(actual, wanted, rtol=1e-11, atol=1e-11)

    def test_gradcheck(self, case: Case) -> None:
        layer = build(case)
        names = [name for name, _ in layer.named_parameters()]

        def call(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
            state = dict(zip(names, values, strict=True))
            y = torch.func.functional_call(layer, state, x)
            return y, torch.func.functional_call(_ToDense(layer), _prefixed(state), ())

        x = draw(2, case[1]).requires_grad_()
        assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)

    # --- precision and compilation ---

    def test_bf16(self, case: Case) -> None:
        layer = build(case, dtype=torch.bfloat16)
        wide = copy.deepcopy(layer).float()
        x = draw(7, case[1]).bfloat16().requires_grad_()
        output = layer(x)
        assert output.dtype == torch.bfloat16
        assert layer.to_dense().dtype == torch.bfloat16
        assert _distance(output, wide(x.float())) < 2e-2
        assert all(grad.isfinite().all() for grad in gradients(layer, x, output))

    def test_autocast(self, case: Case) -> None:
        layer = build(case, dtype=torch.float32)
        x = draw(7, case[1]).float().requires_grad_()
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
            exact = layer.weight
        assert output.dtype == torch.bfloat16
        assert _distance(output, expected) < 2e-2
        assert_close(exact, layer.to_dense(), rtol=1e-5, atol=1e-6)
        wanted = gradients(layer, x, expected)
        for grad, want in zip(gradients(layer, x, output), wanted, strict=True):
            assert grad.dtype == torch.float32
            assert _distance(grad, want) < 3e-2

    @pytest.mark.parametrize("autocast", [False, True])
    def test_compiles_in_one_graph(self, case: Case, autocast: bool) -> None:
        self._compare_compiled(case, "aot_eager", autocast)

    @pytest.mark.slow
    def test_compiles_with_inductor(self, first_case: Case) -> None:
        self._compare_compiled(first_case, "inductor", autocast=False)

    def _compare_compiled(self, case: Case, backend: str, autocast: bool) -> None:
        torch.compiler.reset()
        layer = build(case, dtype=torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        x = draw(2, 3, case[1]).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            expected, actual = layer(x), compiled(x)
        assert actual.dtype == expected.dtype
        limit = 2e-2 if autocast else 1e-5
        assert _distance(actual, expected) < limit
        pairs = zip(gradients(layer, x, actual), gradients(layer, x, expected), strict=True)
        for got, want in pairs:
            assert _distance(got, want) < limit

    # --- projection ---

    def test_projection_recovers_what_has_the_structure(self, case: Case) -> None:
        source, target = build(case).to_dense().detach(), build(case)
        target.reset_parameters(generator=torch.Generator().manual_seed(2))
        assert target.project_(source) is target
        assert target.relative_error(source) < 1e-10

    def test_projection_is_the_best(self, case: Case) -> None:
        layer, weight = build(case), draw(case[2], case[1])
        residual = (weight - layer.project_(weight).to_dense()).square().sum().item()
        best = self.best_residual(case[0], weight.numpy())
        assert residual == pytest.approx(best, rel=1e-10, abs=1e-10)
        relative = math.sqrt(best) / torch.linalg.norm(weight).item()
        assert layer.relative_error(weight) == pytest.approx(relative, rel=1e-8, abs=1e-8)

    def test_projection_is_a_fixed_point(self, case: Case) -> None:
        layer = build(case).project_(draw(case[2], case[1]))
        dense = layer.to_dense().detach()
        assert_close(layer.project_(dense).to_dense(), dense, rtol=1e-10, atol=1e-10)

    def test_no_factors_nearby_are_better(self, case: Case) -> None:
        layer, weight = build(case, bias=False), draw(case[2], case[1])
        error = (weight - layer.project_(weight).to_dense()).square().sum()
        slopes = torch.autograd.grad(error, list(layer.parameters()))
        for slope in slopes:
            assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
        for seed, size in enumerate([1e-4, 1e-3, 1e-2, 1e-1] * 3):
            near = copy.deepcopy(layer)
            with torch.no_grad():
                for parameter in near.parameters():
                    parameter.add_(draw(*parameter.shape, seed=seed), alpha=size)
            moved = (weight - near.to_dense()).square().sum()
            assert moved >= error - 1e-10

    def test_projection_balances_the_factors(self, case: Case) -> None:
        layer = build(case, bias=False).project_(draw(case[2], case[1]))
        norms = [torch.linalg.norm(parameter).item() for parameter in layer.parameters()]
        assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-10)

    def test_projection_refuses_another_shape(self, case: Case) -> None:
        with pytest.raises(ConfigError, match="weight has shape"):
            build(case).project_(draw(case[2] + 1, case[1]))

    def test_projection_of_bf16_is_computed_wider(self, case: Case) -> None:
        weight = draw(case[2], case[1]).bfloat16()
        narrow = build(case, dtype=torch.bfloat16).project_(weight)
        exact = build(case).project_(weight.double())
        assert narrow.relative_error(weight) < exact.relative_error(weight) + 2e-2

    # --- counts ---

    def test_parameters_are_the_factors(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        layer = build(case)
        shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
        stated = {factor.name: factor.shape for factor in config.factors(*sizes)}
        assert shapes == stated | {"bias": (sizes[1],)}
        assert layer.factors == config.factors(*sizes)
        weights = sum(math.prod(shape) for shape in stated.values())
        assert config.num_params(*sizes) == weights
        assert not list(layer.buffers()), "a buffer that can be computed is not kept"

    def test_flops_are_those_that_torch_counts(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        layer = build(case, bias=False)
        with FlopCounterMode(display=False) as forward:
            layer(draw(6, sizes[0]))
        assert forward.get_total_flops() == 6 * config.flops_per_token(*sizes)

    def test_merging_costs_what_is_stated(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        layer = build(case, bias=False)
        with FlopCounterMode(display=False) as merge:
            layer.to_dense()
        assert merge.get_total_flops() == config.to_dense_flops(*sizes)

    def test_its_own_share_is_solved_back(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        count = config.num_params(*sizes)
        solved = config.for_param_ratio(*sizes, count / math.prod(sizes))
        assert type(solved) is type(config)
        assert solved.num_params(*sizes) == count

    @pytest.mark.parametrize("ratio", [1e-6, 0.3, 0.63, 5.0])
    def test_a_solved_share_fits(self, case: Case, ratio: float) -> None:
        config, sizes = case[0], case[1:]
        for multiple_of in (1, 4, 64):
            config.for_param_ratio(*sizes, ratio, multiple_of=multiple_of).factors(*sizes)

    @pytest.mark.parametrize(("ratio", "multiple_of"), [(0.0, 1), (-1.0, 1), (0.5, 0)])
    def test_an_impossible_share_is_refused(
        self, case: Case, ratio: float, multiple_of: int
    ) -> None:
        with pytest.raises(ConfigError, match="must be"):
            case[0].for_param_ratio(case[1], case[2], ratio, multiple_of=multiple_of)

    # --- config ---

    def test_config_survives_json(self, case: Case) -> None:
        config = case[0]
        assert structure_from_target(json.loads(json.dumps(config.to_target()))) == config

    def test_config_refuses_what_it_does_not_know(self, case: Case) -> None:
        target = case[0].to_target()
        with pytest.raises(ConfigError, match=r"initt.*Did you mean 'init'"):
            structure_from_target(target | {"initt": "paper"})
        with pytest.raises(ConfigError, match="init='gauss' must be one of"):
            case[0].replace(init="gauss")
        with pytest.raises(ConfigError, match="version=99"):
            structure_from_target(target | {"version": 99})

    # --- state ---

    def test_state_dict_round_trip(self, case: Case) -> None:
        source, target = build(case), build(case)
        target.reset_parameters(generator=torch.Generator().manual_seed(2))
        target.load_state_dict(source.state_dict(), strict=True)
        x = draw(3, case[1])
        assert torch.equal(target(x), source(x))

    def test_meta_then_materialised_equals_built(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        layer = config.build(*sizes, device="meta")
        assert all(parameter.is_meta for parameter in layer.parameters())
        layer.reset_parameters()
        assert layer.weight.shape == (sizes[1], sizes[0])
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(math.nan)
        layer.reset_parameters(generator=torch.Generator().manual_seed(3))
        torch.manual_seed(3)
        built = config.build(*sizes)
        for name, value in built.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name

    @pytest.mark.parametrize("init", ["paper", "structure_aware"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_one_draw_for_every_dtype(self, case: Case, init: str, dtype: torch.dtype) -> None:
        config, sizes = case[0], case[1:]
        config = config.replace(init=init)
        layers = [config.build(*sizes, device="meta", dtype=kind) for kind in (None, dtype)]
        for layer in layers:
            layer.to_empty(device="cpu")
            layer.reset_parameters(generator=torch.Generator().manual_seed(3))
        first, second = (layer.state_dict() for layer in layers)
        for name, value in first.items():
            assert torch.equal(value.to(dtype), second[name]), name

    def test_structure_aware_scale(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        layer = config.replace(init="structure_aware").build(*sizes)
        for factor in layer.factors:
            draws = []
            for seed in range(-(-4000 // factor.num_params)):
                layer.reset_parameters(generator=torch.Generator().manual_seed(seed))
                draws.append(layer.get_parameter(factor.name).detach().flatten().clone())
            fan_in, fan_out = factor.fan_in, factor.fan_out
            std = fan_in**-0.5 * min(1, math.sqrt(fan_out / fan_in))
            assert torch.cat(draws).std().item() == pytest.approx(std, rel=0.08)

    def test_copies_are_independent(self, case: Case) -> None:
        layer = build(case)
        twin = copy.deepcopy(layer)
        before = layer.to_dense().detach().clone()
        twin.reset_parameters(generator=torch.Generator().manual_seed(2))
        assert torch.equal(layer.to_dense(), before)
        assert twin.config == layer.config

    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_round_trip(self, case: Case, bias: bool) -> None:
        layer = build(case, bias=bias).eval()
        linear = layer.to_linear()
        x = draw(3, case[1])
        assert_close(linear(x), layer(x), rtol=1e-12, atol=1e-12)
        back = StructuredLinear.from_linear(linear.requires_grad_(False), case[0])
        assert type(back) is type(layer)
        assert back.relative_error(linear.weight) < 1e-10
        assert_close(back(x), layer(x), rtol=1e-9, atol=1e-9)
        assert not back.training
        assert not any(parameter.requires_grad for parameter in back.parameters())

    def test_weight_reads_as_that_of_a_linear(self, case: Case) -> None:
        layer = build(case)
        assert torch.equal(layer.weight, layer.to_dense())
        assert not layer.weight.requires_grad
        assert layer.weight._is_hf_initialized  # type: ignore[attr-defined]
        assert "weight" not in layer.state_dict()

    # --- sharding ---

    @pytest.mark.slow
    def test_sharded_equals_whole(self, first_case: Case) -> None:
        run_distributed(_compare_sharded, 2, *first_case)


class _ToDense(nn.Module):
    """``to_dense`` as a forward, for ``functional_call``."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.to_dense()


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"layer.{name}": value for name, value in state.items()}


def _name(case: Case) -> str:
    config, in_features, out_features = case
    fields = "-".join(str(value) for value in config.to_dict().values())
    return f"{config.kind}-{fields}-{in_features}x{out_features}"


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Relative, in Frobenius norm."""
    difference = actual.double() - expected.double()
    return (torch.linalg.norm(difference) / torch.linalg.norm(expected.double())).item()


def _compare_sharded(config: StructureConfig, in_features: int, out_features: int) -> None:
    """On each of two ranks: FSDP2 gives the outputs and the averaged gradients of one process."""
    case = (config, in_features, out_features)
    batches, rank = draw(2, 3, in_features), torch.distributed.get_rank()
    whole, sharded = build(case), build(case)
    outputs = whole(batches)
    outputs.square().mean().backward()
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    output = sharded(batches[rank])
    output.square().mean().backward()
    assert_close(output, outputs[rank], rtol=1e-12, atol=1e-12)
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    for want, got in pairs:
        assert isinstance(got.grad, DTensor)
        assert_close(got.grad.full_tensor(), want.grad, rtol=1e-12, atol=1e-12)

"""The map: forward, gradients, precision, compilation, sharding."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from factorlm.layers import StructureConfig, StructuredLinear
from factorlm.testing.battery.cases import (
    Case,
    StructureCases,
    build,
    distance,
    draw,
    gradients,
)
from factorlm.testing.distributed import run_distributed


class ForwardTests(StructureCases):
    """The layer computes x Wᵀ + b, with W what ``to_dense`` says, however it is run."""

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

    def test_products_hold_every_entry_of_the_dense_weight(self, case: Case) -> None:
        layer, other = build(case), build(case)
        other.reset_parameters(generator=torch.Generator().manual_seed(2))
        factors = [other.get_parameter(factor.name) for factor in other.factors]
        left, right = layer.products(*factors)
        found, expected = (left @ right).flatten(), other.to_dense().flatten()
        assert_close(found.sort().values, expected.sort().values, rtol=1e-12, atol=1e-12)

    def test_matrices_are_all_of_the_map(self, case: Case) -> None:
        layer = build(case)
        matrices = layer.matrices()
        if matrices:
            product = functools.reduce(lambda done, matrix: matrix @ done, matrices)
            assert_close(product, layer.to_dense(), rtol=1e-12, atol=1e-12)

    def test_forward_reads_any_strides(self, case: Case) -> None:
        layer = build(case)
        x = draw(case[1], 4, 6).permute(2, 1, 0)[::2]
        assert_close(layer(x), layer(x.contiguous()), rtol=1e-12, atol=1e-12)

    def test_forward_refuses_another_width(self, case: Case) -> None:
        layer = build(case)
        for width in (case[1] + 1, 2 * case[1]):
            with pytest.raises(RuntimeError):
                layer(draw(4, width))

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

    def test_bf16(self, case: Case) -> None:
        layer = build(case, dtype=torch.bfloat16)
        wide = copy.deepcopy(layer).float()
        x = draw(7, case[1]).bfloat16().requires_grad_()
        output = layer(x)
        assert output.dtype == torch.bfloat16
        assert layer.to_dense().dtype == torch.bfloat16
        assert distance(output, wide(x.float())) < 2e-2
        assert all(grad.isfinite().all() for grad in gradients(layer, x, output))

    def test_autocast(self, case: Case) -> None:
        layer = build(case, dtype=torch.float32)
        x = draw(7, case[1]).float().requires_grad_()
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
            exact = layer.weight
        assert output.dtype == torch.bfloat16
        assert distance(output, expected) < 2e-2
        assert_close(exact, layer.to_dense(), rtol=1e-5, atol=1e-6)
        wanted = gradients(layer, x, expected)
        for grad, want in zip(gradients(layer, x, output), wanted, strict=True):
            assert grad.dtype == torch.float32
            assert distance(grad, want) < 3e-2

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
        assert distance(actual, expected) < limit
        pairs = zip(gradients(layer, x, actual), gradients(layer, x, expected), strict=True)
        for got, want in pairs:
            assert distance(got, want) < limit

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

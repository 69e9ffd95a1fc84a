"""State: files, the meta device, initialisation, copies, dense layers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from factorlm.layers import StructuredLinear
from factorlm.testing.battery.cases import Case, StructureCases, build, draw


class StateTests(StructureCases):
    """A layer can be saved, materialised, drawn, copied and exchanged with ``nn.Linear``."""

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

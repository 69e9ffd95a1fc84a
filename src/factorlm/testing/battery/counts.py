"""Counts: what the config states is what the layer holds and computes."""

from __future__ import annotations

import json
import math

import pytest
from torch.utils.flop_counter import FlopCounterMode

from factorlm.errors import ConfigError
from factorlm.layers import structure_from_target
from factorlm.testing.battery.cases import Case, StructureCases, build, draw


class CountTests(StructureCases):
    """Parameters, FLOPs and shares agree with the built layer; the config survives JSON."""

    def test_parameters_are_the_factors(self, case: Case) -> None:
        config, sizes = case[0], case[1:]
        layer = build(case)
        shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
        stated = {factor.name: factor.shape for factor in config.factors(*sizes)}
        assert shapes == stated | {"bias": (sizes[1],)}
        assert layer.factors == config.factors(*sizes)
        weights = sum(math.prod(shape) for shape in stated.values())
        assert config.num_params(*sizes) == weights
        unsaved = {name for name, _ in layer.named_buffers()} - set(layer.state_dict())
        assert not unsaved, "a tensor that no file holds is garbage after loading: compute it"

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

"""Projection: the best approximation, and nothing less."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from factorlm.errors import ConfigError
from factorlm.testing.battery.cases import Case, StructureCases, build, draw


class ProjectionTests(StructureCases):
    """``project_`` finds the nearest weight of the structure, with balanced factors."""

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

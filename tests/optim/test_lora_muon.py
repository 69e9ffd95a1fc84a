"""LoRA-Muon: the root of a Gram matrix, the invariance, a step written out with exact parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factorlm.errors import ConfigError
from factorlm.optim import FactorOptimizer, newton_schulz
from factorlm.optim.lora_muon import inverse_root

I, O, R = 12, 20, 5  # noqa: E741


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(V: Tensor, U: Tensor, G: Tensor, *, steps: int = 3, **options: Any) -> Tensor:
    """U V after some steps on the loss <G, U V>."""
    V, U = nn.Parameter(V.clone()), nn.Parameter(U.clone())
    group = {"params": [V, U], "rule": "lora_muon", "lr": 0.01, "weight_decay": 0.0}
    optimizer = FactorOptimizer([group | options])
    for _ in range(steps):
        optimizer.zero_grad()
        (G * (U @ V)).sum().backward()
        optimizer.step()
    return (U @ V).detach()


def root_by_eigenvalues(gram: Tensor, damping: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(gram.numpy())
    return (vectors / np.sqrt(values + damping * np.trace(gram.numpy()))) @ vectors.T


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 0.0])
def test_inverse_root_equals_the_one_by_eigenvalues(smallest: float) -> None:
    basis = torch.linalg.qr(draw(R, R)).Q
    values = torch.logspace(0, -4, R, dtype=torch.float64).clamp(min=smallest)
    if smallest == 0:
        values[-1] = 0
    gram = 7 * (basis * values) @ basis.T
    wanted = root_by_eigenvalues(gram, 1e-4)
    np.testing.assert_allclose(inverse_root(gram, 1e-4).numpy(), wanted, rtol=2e-4, atol=2e-4)
    narrow = inverse_root(gram.float(), 1e-4).numpy()
    np.testing.assert_allclose(narrow, wanted, rtol=2e-3, atol=2e-3)


def test_a_first_step_is_the_formula() -> None:
    """ΔU = -η/2 msign(M S_V^-½) S_V^-½, with the same msign and exact roots."""
    V, U, G = draw(R, I, seed=1), draw(O, R, seed=2), draw(O, I, seed=3)
    pair = [nn.Parameter(V.clone()), nn.Parameter(U.clone())]
    optimizer = FactorOptimizer(
        [{"params": pair, "rule": "lora_muon", "lr": 0.01, "weight_decay": 0.1}]
    )
    (G * (pair[1] @ pair[0])).sum().backward()
    optimizer.step()
    roots = [torch.tensor(root_by_eigenvalues(S, 1e-4)) for S in (V @ V.T, U.T @ U)]
    eta = 0.01 * 0.2 * O**0.5
    U_step = newton_schulz(G @ V.T @ roots[0]) @ roots[0]
    V_step = roots[1] @ newton_schulz(roots[1] @ U.T @ G)
    torch.testing.assert_close(pair[0].data, 0.999 * V - eta / 2 * V_step, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pair[1].data, 0.999 * U - eta / 2 * U_step, rtol=1e-5, atol=1e-7)


def test_how_the_scale_is_shared_does_not_matter() -> None:
    """U C and C⁻¹ V for a C that is neither orthogonal nor small."""
    V, U, G = draw(R, I, seed=1), draw(O, R, seed=2), draw(O, I, seed=3)
    C = torch.diag(torch.tensor([0.3, 1.0, 2.0, 4.0, 0.5], dtype=torch.float64))
    C = C + 0.2 * draw(R, R, seed=4)
    start = U @ V
    plain = moved(V, U, G, damping=1e-12) - start
    other = moved(torch.linalg.solve(C, V), U @ C, G, damping=1e-12) - start
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7 * float(plain.abs().max()))
    # Muon on each factor does depend on it.
    plain = moved(V, U, G, rule="muon") - start
    other = moved(torch.linalg.solve(C, V), U @ C, G, rule="muon") - start
    assert float((other - plain).abs().max()) > 0.1 * float(plain.abs().max())


@pytest.mark.parametrize("seed", range(4))
def test_the_product_moves_at_most_eta_to_first_order(seed: int) -> None:
    """‖ΔU V‖ and ‖U ΔV‖ are at most 1.203 η/2 each."""
    V, U, G = draw(R, I, seed=seed), draw(O, R, seed=seed + 9), draw(O, I, seed=seed + 19)
    change = moved(V, U, G, steps=1, lr=1e-4) - U @ V
    eta = 1e-4 * 0.2 * O**0.5
    norm = float(torch.linalg.matrix_norm(change, 2))
    assert 0.3 * eta < norm < 1.203 * eta * 1.001


def test_refusals() -> None:
    blocks = [nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(2, 4, 3))]
    with pytest.raises(ConfigError, match="must be a matrix, not a stack of blocks"):
        FactorOptimizer([{"params": blocks, "rule": "lora_muon"}])
    V, U = nn.Parameter(torch.zeros(R, I)), nn.Parameter(torch.zeros(O, R))
    with pytest.raises(ConfigError, match="must be a pair in order of application"):
        FactorOptimizer([{"params": [U, V], "rule": "lora_muon"}])
    with pytest.raises(ConfigError, match="damping=0 of a group with rule='lora_muon'"):
        FactorOptimizer([{"params": [V, U], "rule": "lora_muon", "damping": 0}])

"""The truncated SVD against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorlm.layers.projection import balanced_svd, wide


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 5, 7)])
@pytest.mark.parametrize("rank", [1, 3])
def test_product_is_the_best_of_its_rank(shape: tuple[int, ...], rank: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    left, right = balanced_svd(weight, rank)
    P, S, Q = np.linalg.svd(weight.numpy(), full_matrices=False)
    best = (P[..., :rank] * S[..., None, :rank]) @ Q[..., :rank, :]
    np.testing.assert_allclose((left @ right).numpy(), best, atol=1e-12)
    gram = np.stack([(left.mT @ left).numpy(), (right @ right.mT).numpy()])
    expected = S[..., :rank, None] * np.eye(rank)
    np.testing.assert_allclose(gram, np.broadcast_to(expected, gram.shape), atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_wide(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert wide(torch.ones(2, dtype=dtype)).dtype == expected

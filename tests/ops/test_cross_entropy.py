"""Chunked cross entropy against PyTorch's own on the full logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from factorlm.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy

N, H, V = 23, 7, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, bias, labels


def expected(hidden, weight, bias, labels, scale=1.0, softcap=None):  # type: ignore[no-untyped-def]
    logits = scale * functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("chunk_elements", [1, V * 4, V * N, 10**6])
@pytest.mark.parametrize(
    ("scale", "softcap", "with_bias"),
    [(1.0, None, True), (1.0, None, False), (0.25, None, True), (1.5, 3.0, True)],
)
def test_equals_cross_entropy_of_full_logits(chunk_elements, scale, softcap, with_bias) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels = inputs()
    bias_or_none = bias if with_bias else None
    wanted = expected(hidden, weight, bias_or_none, labels, scale, softcap)
    found = linear_cross_entropy(
        hidden, weight, bias_or_none, labels,
        scale=scale, softcap=softcap, chunk_elements=chunk_elements,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    tensors = [hidden, weight] + ([bias] if with_bias else [])
    for mine, theirs in zip(
        torch.autograd.grad(found * 3, tensors),
        torch.autograd.grad(wanted * 3, tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_only_the_gradients_that_are_asked_for() -> None:
    hidden, weight, bias, labels = inputs()
    loss = linear_cross_entropy(hidden.detach(), weight, None, labels, chunk_elements=V * 4)
    (grad,) = torch.autograd.grad(loss, [weight])
    (wanted,) = torch.autograd.grad(expected(hidden, weight, None, labels), [weight])
    torch.testing.assert_close(grad, wanted)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, bias, labels)
    assert not quiet.requires_grad


def test_all_labels_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, None, torch.full_like(labels, IGNORE_INDEX))
    assert loss.item() == 0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, [hidden, weight]))


def test_backward_twice_gives_the_same_gradients() -> None:
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, None, labels)
    first = torch.autograd.grad(loss * 2, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss * 2, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_bf16_autocast_the_loss_is_float32_and_near() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    wanted = expected(hidden, weight, None, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, None, labels, chunk_elements=V * 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
    (grad,) = torch.autograd.grad(found, [weight])
    (exact,) = torch.autograd.grad(wanted, [weight])
    assert grad.dtype == torch.float32
    assert torch.linalg.norm(grad - exact) < 2e-2 * torch.linalg.norm(exact)


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    log_softmax = torch.log_softmax

    def watched(z: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(z.numel())
        return log_softmax(z, dim)

    monkeypatch.setattr(torch, "log_softmax", watched)
    hidden, weight, _, labels = inputs()
    linear_cross_entropy(hidden, weight, None, labels, chunk_elements=V * 4)
    assert sum(sizes) == N * V
    assert max(sizes) <= V * 4

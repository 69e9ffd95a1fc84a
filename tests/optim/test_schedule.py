"""Learning rates against transformers' schedules and the rules of the docstring."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from factorlm.optim import build_adamw, decay_groups, learning_rate_at


def rates(num_steps: int, **fields) -> list[float]:  # type: ignore[no-untyped-def]
    return [learning_rate_at(step, num_steps, peak=2.0, **fields) for step in range(num_steps)]


def test_warmup_is_linear_and_never_zero() -> None:
    found = rates(100, warmup_ratio=0.1)
    steps = [found[i + 1] - found[i] for i in range(10)]
    assert found[0] > 0
    assert found[10] == 2.0 == max(found)
    assert steps == pytest.approx([steps[0]] * 10)


def test_cosine_follows_transformers_between_warmup_and_end() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=0, num_training_steps=99, min_lr_rate=0.1
    )
    wanted = []
    for _ in range(100):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(100, warmup_ratio=0.0) == pytest.approx(wanted)


def test_wsd_is_flat_then_linear_to_the_final_ratio() -> None:
    found = rates(100, kind="wsd", warmup_ratio=0.1, decay_ratio=0.2, final_ratio=0.0)
    assert found[10:81] == [2.0] * 71
    drops = [found[i] - found[i + 1] for i in range(80, 99)]
    assert drops == pytest.approx([drops[0]] * 19)
    assert found[-1] == pytest.approx(0.0)


def test_constant_and_single_step() -> None:
    assert rates(5, kind="constant", warmup_ratio=0.0) == [2.0] * 5
    assert rates(1) == [2.0]


def model() -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    net[2].bias.requires_grad_(False)
    return net


def test_matrices_decay_and_vectors_do_not() -> None:
    decayed, spared = decay_groups(model(), 0.1)
    assert decayed["names"] == ["0.weight", "2.weight"]
    assert spared["names"] == ["0.bias", "1.weight", "1.bias"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_all_decays_everything_that_trains() -> None:
    (group,) = decay_groups(model(), 0.1, "all")
    assert len(group["params"]) == 5


def test_adamw_step_equals_the_unfused_one() -> None:
    ours, plain = model(), model()
    plain.load_state_dict(ours.state_dict())
    optimizer = build_adamw(ours, learning_rate=0.01, weight_decay=0.1, decay="all")
    reference = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad],
        lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=False, foreach=False,
    )  # fmt: skip
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for net, step in ((ours, optimizer), (plain, reference)):
            step.zero_grad()
            net(x).square().sum().backward()
            step.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)

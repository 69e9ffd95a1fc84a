"""Learning rates against transformers' schedules and the rules of the docstring."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from factorlm.optim import learning_rate_at


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

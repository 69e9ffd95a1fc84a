"""What is measured, of which layers, and where it goes. No time decides: the clock is ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from factorlm.errors import ConfigError, StorageError
from factorlm.inference import LayerCase, tune
from factorlm.inference import tuning as tuning_module
from factorlm.inference.latency import cached_table
from factorlm.layers import DenseConfig, LowRankConfig, MergePolicy
from factorlm.measure import Measurement, measure_latency


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model() -> nn.Sequential:
    """Two layers of one case, one of another, and two that are nothing to tune.

    In float64, which is not packed: PyTorch counts the FLOPs of plain matmuls alone.
    """
    wide = [LowRankConfig(rank=3).build(16, 32) for _ in range(2)]
    narrow = LowRankConfig(rank=2).build(32, 16, bias=False)
    untuned = DenseConfig().build(32, 32), nn.Linear(32, 4)
    return nn.Sequential(wide[0], narrow, wide[1], *untuned).double()


class FakeMeasure:
    """In place of ``measure_latency``: FLOPs of a call count as its milliseconds, an overhead of
    ``per_call`` for each matmul comes on top, and ``noise`` is what rounds differ by."""

    def __init__(self, per_call: float = 0.0, noise: float = 0.0) -> None:
        self.per_call, self.noise = per_call, noise
        self.flops: list[dict[str, int]] = []

    def __call__(
        self, cases: Mapping[str, Callable[[], object]], **options: object
    ) -> dict[str, Measurement]:
        found, flops = {}, {}
        for name, case in cases.items():
            with FlopCounterMode(display=False) as counter:
                case()
            flops[name] = counter.get_total_flops()
            matmuls = 2 if name == "structured" else 1
            middle = flops[name] + matmuls * self.per_call
            rounds = (middle - self.noise, middle, middle + self.noise)
            found[name] = Measurement(latencies_ms=rounds, calls_per_round=1)
        self.flops.append(flops)
        return found


def test_each_case_once_with_every_count_by_both_forms() -> None:
    measure = FakeMeasure()
    tables = tune(model(), max_tokens=9, measure=measure)
    cases = [(case.in_features, case.out_features, case.bias) for case in tables]
    assert cases == [(16, 32, True), (32, 16, False)]
    counts = [1, 2, 4, 8]
    assert all([row.num_tokens for row in table.rows] == counts for table in tables.values())
    dense, factors = 2 * 16 * 32, (2 * 3 * 48, 2 * 2 * 48)
    wanted = [
        {"structured": n * factors[index], "merged": n * dense} for index in (0, 1) for n in counts
    ]
    assert measure.flops == wanted, "and no copy is made while a case is timed"


def test_merged_is_what_is_faster_by_more_than_noise() -> None:
    """Per token the factors of the first case take 288 FLOPs and the dense weight 1024: with an
    overhead of 3000 a matmul, merged is faster up to 4.07 tokens."""
    wide, _ = tune(model(), max_tokens=8, measure=FakeMeasure(per_call=3000)).values()
    assert wide.policy.merged == (True, True, True, False)
    # 3000 - 736 n, less the quartiles' distance, which is the noise of three rounds.
    noisy, _ = tune(model(), max_tokens=8, measure=FakeMeasure(per_call=3000, noise=900)).values()
    assert [row.noise_ms for row in noisy.rows] == [900] * 4
    assert noisy.policy.merged == (True, True, False, False)


def test_tables_are_kept_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    tables = tune(
        model(),
        max_tokens=2,
        measure=FakeMeasure(),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(tables) == 2
    assert {case: cached_table(case) for case in tables} == tables


def test_what_was_measured_before_an_interruption_is_kept() -> None:
    tuned = model()
    measure = FakeMeasure()

    def interrupted(cases: Mapping[str, Callable[[], object]], **options: object):
        if len(measure.flops) == 3:
            raise KeyboardInterrupt
        return measure(cases, **options)

    with pytest.raises(KeyboardInterrupt):
        tune(tuned, max_tokens=2, measure=interrupted)
    assert cached_table(LayerCase.of(tuned[0])) is not None
    assert cached_table(LayerCase.of(tuned[1])) is None


def test_layers_of_a_case_take_turns_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = model()
    called: list[int] = []
    forward = type(tuned[0]).forward

    def noted(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        called.append(id(self))
        return forward(self, x)

    monkeypatch.setattr(type(tuned[0]), "forward", noted)

    def measure(cases: Mapping[str, Callable[[], object]], **options: object):
        called.clear()
        for _ in range(4):
            cases["structured"]()
        return FakeMeasure()(cases)

    limit = 16 * 32 * 8
    for factor, wanted in ((2, [0, 2, 0, 2]), (1, [0, 0, 0, 0])):
        monkeypatch.setattr(tuning_module, "TURNING_BYTES", factor * limit)
        seen: list[list[int]] = []

        def recorded(cases, seen=seen, **options):
            found = measure(cases, **options)
            seen.append(called[:4])
            return found

        tune(tuned, max_tokens=1, measure=recorded)
        assert seen[0] == [id(tuned[index]) for index in wanted]


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 1)  # type: ignore[assignment]


@torch.no_grad()
@pytest.mark.parametrize("policy", [MergePolicy.always(), MergePolicy.never()], ids=str)
def test_on_a_gpu_all_layers_of_a_case_are_one_graph(
    monkeypatch: pytest.MonkeyPatch, policy: MergePolicy
) -> None:
    """Each called once in a replay, by the form that is asked for."""
    captured = []

    def capture(step, device):
        captured.append(device)
        return step

    monkeypatch.setattr(tuning_module, "capture", capture)
    monkeypatch.setattr("factorlm.ops.low_rank.has_kernel", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuned = model()
    layers = [tuned[0], tuned[2]]
    x = torch.randn(4, 16, dtype=torch.float64)
    run, num_layers = tuning_module._timed(layers, policy, x.as_subclass(OnGPU))
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(run().as_subclass(torch.Tensor), layers[-1](x))
    one = 2 * 16 * 32 if policy.ever_merges else 2 * 3 * 48
    assert counter.get_total_flops() == 4 * (2 * one + 2 * 3 * 48)
    assert captured == [torch.device("cuda", 1)]
    assert num_layers == 2


def test_a_latency_is_that_of_one_layer() -> None:
    found = {
        name: Measurement(latencies_ms=(ms - 2, ms, ms + 2), calls_per_round=1)
        for name, ms in (("structured", 8.0), ("merged", 4.0))
    }
    row = tuning_module._latency(4, found, {"structured": 2, "merged": 2})
    assert (row.structured_ms, row.merged_ms, row.noise_ms) == (4.0, 2.0, 1.0)


def test_with_the_real_timer_and_a_clock_of_our_own() -> None:
    """``measure_latency`` takes what ``tune`` gives it; nothing waits, since our clock jumps."""
    now = iter(range(10**9))
    measure = partial(measure_latency, rounds=3, clock=lambda: next(now))
    for table in tune(model(), max_tokens=2, measure=measure).values():
        assert [row.structured_ms for row in table.rows] == [1000.0, 1000.0]
        assert not table.policy.ever_merges


def test_the_model_keeps_its_mode_and_its_layers() -> None:
    tuned = model().train()
    before = list(tuned)
    tune(tuned, max_tokens=1, measure=FakeMeasure())
    assert list(tuned) == before
    assert all(module.training for module in tuned.modules())


def test_refusals(cache: Path) -> None:
    with pytest.raises(ConfigError, match="Linear has no structured layer"):
        tune(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="max_tokens=0 must be at least 1"):
        tune(model(), max_tokens=0)
    with pytest.raises(ConfigError, match="on the meta device"):
        tune(nn.Sequential(LowRankConfig(rank=1).build(2, 2, device="meta")))
    cache.write_text("a file")
    measure = FakeMeasure()
    with pytest.raises(StorageError, match="cannot write"):
        tune(model(), max_tokens=1, measure=measure)
    assert not measure.flops, "refused before it is measured"

"""Kept CUDA graphs: with merged copies, after weights moved, on another device, in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.inference.test_steps import STRUCTURES
from transformers import PreTrainedModel

from factorlm import (
    MergePolicy,
    factorize_,
    premerge_,
)
from factorlm.inference import Decoder, Sampling, premerged_layers, tune
from factorlm.inference.capture import capture
from factorlm.inference.graph import GraphSteps
from factorlm.ops import low_rank as low_rank_module
from factorlm.testing.models import tiny_model

GREEDY = Sampling(greedy=True)
PROMPTS = [list(range(5, 12)), [7, 8, 9]]


def model_of(structure: str = "low_rank", device: str = "cuda") -> PreTrainedModel:
    model = tiny_model("llama", initializer_range=0.3)
    factorize_(model, STRUCTURES[structure])
    return model.to(device).eval()


def assert_generates(kept: Decoder, model: PreTrainedModel, count: int = 20) -> GraphSteps:
    """The tokens of plain steps of the model as it is now."""
    plain = Decoder(model, cuda_graph=False)
    found, expected = (
        one.generate(PROMPTS, max_new_tokens=count, sampling=GREEDY).ids for one in (kept, plain)
    )
    assert torch.equal(found, expected)
    (steps,) = kept._kept.values()
    assert isinstance(steps, GraphSteps)
    return steps


@torch.no_grad()
def in_place(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.25)


def to_the_cpu_and_back(model: PreTrainedModel) -> None:
    held = [parameter.data for parameter in model.parameters()]
    model.cpu()
    in_place(model)
    model.cuda()
    for memory in held:
        memory.fill_(torch.nan)  # what a graph would read that nobody told


def load_assigning(model: PreTrainedModel) -> None:
    model.load_state_dict(
        {name: value * 1.25 for name, value in model.state_dict().items()}, assign=True
    )


@pytest.mark.parametrize("change", [in_place, to_the_cpu_and_back, load_assigning])
@pytest.mark.parametrize("policy", [MergePolicy.always(), MergePolicy.never()], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_graph_follows_its_weights(
    structure: str, policy: MergePolicy, change: Callable[[PreTrainedModel], None]
) -> None:
    model = model_of(structure)
    premerge_(model, policy)
    kept = Decoder(model, max_length=40)
    for _ in range(2):
        steps = assert_generates(kept, model)
        assert steps._captured is not None
        assert len(steps._captured._copies._all) == (6 if policy.ever_merges else 0)
    change(model)
    is_the_same = assert_generates(kept, model) is steps
    assert is_the_same == (change is in_place and not policy.ever_merges)


def test_a_captured_layer_reads_the_merged_copy() -> None:
    """Which shows where the copy is written to, unseen."""
    model = model_of()
    premerge_(model, MergePolicy.always())
    layer = next(iter(premerged_layers(model).values()))
    x = torch.randn(2, layer.in_features, device="cuda")
    with torch.no_grad():
        replay = capture(lambda: layer(x))
        expected = layer.structured(x)
        torch.testing.assert_close(replay(), expected, rtol=1e-3, atol=1e-3)
        assert expected.abs().max() > 0.01
        layer._merged._copy.kept[0].zero_()
        assert replay().abs().max() == 0
        assert replay.is_current()
        layer.invalidate()
        assert not replay.is_kept()


def test_runs_before_a_capture_compare_the_kernel_at_the_rows_of_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where two rows are merged and three are not."""
    monkeypatch.setattr(low_rank_module, "_AGREES", {})
    model = model_of()
    premerge_(model, MergePolicy(token_counts=(2, 3), merged=(True, False)))
    with torch.no_grad():
        GraphSteps(model, 2, 40)
        assert not low_rank_module._AGREES
        GraphSteps(model, 3, 40)
        assert set(low_rank_module._AGREES.values()) == {True}


@pytest.mark.parametrize("policy", [MergePolicy.always(), MergePolicy.never()], ids=str)
def test_threads_with_a_decoder_each_capture_and_replay(policy: MergePolicy) -> None:
    """All at once, while others allocate, with one model."""
    model = model_of()
    premerge_(model, policy)
    prompts = [[5 + 10 * row, 7, 90 - row] for row in range(4)]
    expected = [
        Decoder(model, cuda_graph=False).generate([p], max_new_tokens=12, sampling=GREEDY).ids
        for p in prompts
    ]
    start = threading.Barrier(4)

    def body(prompt: list[int]) -> torch.Tensor:
        start.wait()
        for _ in range(5):
            found = Decoder(model).generate([prompt], max_new_tokens=12, sampling=GREEDY).ids
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(body, prompts))
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_on_another_device_than_the_current_one(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank_module, "_AGREES", {})
    for device in ("cuda:0", "cuda:1"):
        model = model_of(structure, device)
        assert_generates(Decoder(model, max_length=40), model)
    assert torch.cuda.current_device() == 0
    kernels = {case[0] for case in low_rank_module._AGREES}
    assert len(kernels) == (2 if structure == "low_rank" else 0)


def test_tuning_times_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path))
    model = model_of()
    tables = tune(model, max_tokens=4)
    assert len(tables) == 2
    for case, table in tables.items():
        assert case.key()["timed"] == "CUDA graph"
        assert all(0 < min(row.structured_ms, row.merged_ms) < 1 for row in table.rows)
    premerge_(model)
    assert_generates(Decoder(model, max_length=40), model)

"""When a kept CUDA graph is still right, with a capture that only counts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorlm import LowRankConfig, MergePolicy, factorize_, premerge_, unpremerge_
from factorlm.inference import Decoder, Sampling, decoder, premerged_layers
from factorlm.inference import capture as capture_module
from factorlm.inference.capture import NUM_WARM_UPS
from factorlm.inference.graph import GraphSteps
from factorlm.layers import premerged as premerged_module
from factorlm.testing.models import tiny_input_ids, tiny_model

GREEDY = Sampling(greedy=True)
MAX_LENGTH = 24
PROMPT = [5, 9, 70]


class Recorder:
    """In the place of ``record``: runs before a capture, the captured one, and replays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        self.capturing = False
        monkeypatch.setattr(capture_module, "record", self.record)
        monkeypatch.setattr(premerged_module, "_is_captured", lambda x: self.capturing)
        monkeypatch.setattr(decoder, "can_capture", lambda model, length: True)

    def record(self, step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        for _ in range(NUM_WARM_UPS):
            step()
        self.captures += 1
        self.capturing = True
        step()
        self.capturing = False

        def replay() -> Tensor:
            self.replays += 1
            return step()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def low_rank_model(policy: MergePolicy | None = None) -> PreTrainedModel:
    """In float64, which no CPU packs."""
    model = tiny_model("llama", initializer_range=0.3)
    factorize_(model, LowRankConfig(rank=6))
    model = model.double().eval()
    if policy is not None:
        premerge_(model, policy)
    return model


def assert_generates(kept: Decoder, model: PreTrainedModel, count: int = 4) -> None:
    """What a decoder of today's model does."""
    found = kept.generate([PROMPT], max_new_tokens=count, sampling=GREEDY).ids
    plain = Decoder(model, cuda_graph=False)
    assert torch.equal(found, plain.generate([PROMPT], max_new_tokens=count, sampling=GREEDY).ids)


def double(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value * 2 for name, value in model.state_dict().items()}


def load_assigning(model: PreTrainedModel) -> None:
    model.load_state_dict(double(model), assign=True)


def to_another_dtype_and_back(model: PreTrainedModel) -> None:
    """Other memory, as a way over another device leaves it."""
    before = [parameter.data for parameter in model.parameters()]
    model.float().double()
    assert before[0].data_ptr() != next(model.parameters()).data_ptr()


def new_buffer(model: PreTrainedModel) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


def new_head(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * -1)


def new_strides(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.t()


@torch.no_grad()
def in_place(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def nothing(model: PreTrainedModel) -> None:
    pass


MOVED = (load_assigning, to_another_dtype_and_back, new_buffer, new_head, new_strides)


@torch.no_grad()
@pytest.mark.parametrize("change", [*MOVED, in_place, nothing])
def test_weights_that_lie_elsewhere_are_captured_anew(
    recorder: Recorder, change: Callable[[PreTrainedModel], None]
) -> None:
    """Once; a graph sees for itself what is written in place."""
    model = low_rank_model()
    kept = Decoder(model, max_length=MAX_LENGTH)
    assert_generates(kept, model)
    change(model)
    for _ in range(2):
        assert_generates(kept, model)
        assert recorder.captures == 1 + (change in MOVED)
    assert recorder.replays == 3 * 3


@pytest.mark.parametrize("change", [*MOVED, in_place, nothing])
def test_merged_copies_are_made_and_captured_anew(
    recorder: Recorder, change: Callable[[PreTrainedModel], None]
) -> None:
    model = low_rank_model(MergePolicy.always())
    kept = Decoder(model, max_length=MAX_LENGTH)
    assert_generates(kept, model)
    (steps,) = kept._kept.values()
    assert isinstance(steps, GraphSteps)
    assert steps._captured is not None
    assert len(steps._captured._copies._all) == len(premerged_layers(model)) == 6
    change(model)
    for _ in range(2):
        assert_generates(kept, model)
        assert recorder.captures == 1 + (change is not nothing)


@torch.no_grad()
def test_the_policy_chooses_by_the_rows_of_the_batch(recorder: Recorder) -> None:
    """Two tokens a step are merged, four are not, and leave no copy behind."""
    model = low_rank_model(MergePolicy(token_counts=(2, 4), merged=(True, False)))
    for rows, merged in ((4, False), (2, True)):
        steps = GraphSteps(model, rows, MAX_LENGTH)
        assert len(steps._captured._copies._all) == 6 * merged
        assert all(layer.has_copy == merged for layer in premerged_layers(model).values())


@torch.no_grad()
def test_a_copy_that_goes_within_a_generation_ends_the_replays(recorder: Recorder) -> None:
    """An optimizer elsewhere in the process drops all. The steps go on without the graph."""
    model, reference = low_rank_model(MergePolicy.always()), low_rank_model()
    reference.load_state_dict(model.state_dict())
    steps, plain = (GraphSteps(one, 2, MAX_LENGTH) for one in (model, reference))
    recorder.replays = 0
    ids = tiny_input_ids(batch=2, length=12)
    for one in (steps, plain):
        one.prefill(ids[:, :3], None)
    for place in range(3, 12):
        if place == 7:
            assert recorder.replays == 2 * 4
            parameter = nn.Parameter(torch.zeros(1))
            parameter.grad = torch.ones(1)
            torch.optim.SGD([parameter]).step()
        found, expected = (one.step(ids[:, place]) for one in (steps, plain))
        torch.testing.assert_close(found, expected)
    assert recorder.replays == 2 * 4 + 5
    assert not steps.is_current()


def test_taking_the_copies_off_leaves_graphs_right(recorder: Recorder) -> None:
    """They hold what they read, until a weight changes."""
    model = low_rank_model(MergePolicy.always())
    kept = Decoder(model, max_length=MAX_LENGTH)
    assert_generates(kept, model)
    unpremerge_(model)
    assert_generates(kept, model)
    assert recorder.captures == 1
    in_place(model)
    assert_generates(kept, model)
    assert recorder.captures == 2


def test_what_is_replaced_is_freed_first(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cycle keeps a graph and its cache until the next collection."""
    model = low_rank_model()
    kept = Decoder(model, max_length=MAX_LENGTH)
    kept.generate([PROMPT], max_new_tokens=2)
    (steps,) = kept._kept.values()
    gone = weakref.ref(steps._cache.layers[0].keys)
    del steps
    new_head(model)
    make, found = kept._make_steps, []
    monkeypatch.setattr(kept, "_make_steps", lambda *args: found.append(gone()) or make(*args))
    gc.disable()
    try:
        kept.generate([PROMPT], max_new_tokens=2)
    finally:
        gc.enable()
    assert found == [None]


def test_plain_steps_are_always_current() -> None:
    model = low_rank_model()
    kept = Decoder(model, max_length=MAX_LENGTH)
    kept.generate([PROMPT], max_new_tokens=2)
    (before,) = kept._kept.values()
    load_assigning(model)
    kept.generate([PROMPT], max_new_tokens=2)
    assert list(kept._kept.values()) == [before]

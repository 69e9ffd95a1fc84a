"""What a CUDA graph replays, run here without one; ``tests/gpu`` has the graph itself."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorlm import LowRankConfig, factorize_
from factorlm.anatomy import anatomy_of
from factorlm.errors import ConfigError
from factorlm.inference import Decoder, Sampling, capture, generate_tokens
from factorlm.inference.capture import NUM_WARM_UPS
from factorlm.inference.graph import GraphSteps, can_capture, is_steady
from factorlm.inference.steps import CachedSteps
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids, tiny_model

LENGTH, MAX_LENGTH = 7, 24
NOT_STEADY = {"bloom", "mpt"}
"""They make ALiBi from the mask."""


@pytest.fixture(autouse=True)
def _run_instead_of_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-ups leave their traces, as a capture's do."""

    def run(step, device):
        for _ in range(NUM_WARM_UPS):
            step()
        return step

    monkeypatch.setattr(capture, "record", run)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - NOT_STEADY))
def test_fixed_memory_gives_the_logits_of_the_growing_one(family: str) -> None:
    """Twice with the same graph: padded, then not."""
    model = tiny_model(family, initializer_range=0.1)
    if anatomy_of(model).ffn_linears:
        factorize_(model, LowRankConfig(rank=6))
    assert is_steady(model, MAX_LENGTH)
    fixed, growing = GraphSteps(model, 3, MAX_LENGTH), CachedSteps(model, MAX_LENGTH)
    for seed, num_pads in enumerate((torch.tensor([0, 2, 5]), None)):
        ids = tiny_input_ids(batch=3, length=MAX_LENGTH, seed=seed)
        prompts = ids[:, :LENGTH], num_pads
        found, expected = fixed.prefill(*prompts), growing.prefill(*prompts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for place in range(LENGTH, MAX_LENGTH - 1):
            found, expected = fixed.step(ids[:, place]), growing.step(ids[:, place])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_step_writes_only_memory_that_stays() -> None:
    model = tiny_model("llama")
    steps = GraphSteps(model, 2, MAX_LENGTH)
    layer = steps._cache.layers[0]
    tensors = [layer.keys, layer.values, steps._token, steps._position, steps._mask]
    where = [tensor.data_ptr() for tensor in tensors]
    for seed in range(2):
        steps.prefill(tiny_input_ids(batch=2, seed=seed), None)
        steps.step(torch.tensor([5, 6]))
    now = [layer.keys, layer.values, steps._token, steps._position, steps._mask]
    assert [tensor.data_ptr() for tensor in now] == where
    assert steps._position.tolist() == [[11], [11]]


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - NOT_STEADY))
def test_step_moves_no_number_that_python_holds(family: str) -> None:
    """A graph would replay the one that it saw, as it would of layers that count their window."""
    steps = GraphSteps(tiny_model(family), 2, MAX_LENGTH)
    steps.prefill(tiny_input_ids(batch=2), None)
    before = [held_by_python(layer) for layer in steps._cache.layers]
    steps.step(torch.tensor([5, 6]))
    assert [held_by_python(layer) for layer in steps._cache.layers] == before


def held_by_python(layer: object) -> dict[str, object]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, int | str)}


def test_what_changes_with_the_length_is_not_captured() -> None:
    assert not any(is_steady(tiny_model(family), MAX_LENGTH) for family in NOT_STEADY)
    assert not is_steady(tiny_model("falcon", alibi=True), MAX_LENGTH)
    assert not is_steady(tiny_model("llama"), NUM_WARM_UPS)
    mistral = tiny_model("mistral", sliding_window=8)
    assert [is_steady(mistral, length) for length in (8, 9)] == [True, False]
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not is_steady(tiny_model("llama", rope_parameters=dynamic), MAX_LENGTH)


def test_a_model_on_the_cpu_is_not_captured() -> None:
    assert not can_capture(tiny_model("llama"), MAX_LENGTH)


@torch.no_grad()
def test_compiled_steps_give_the_tokens_of_plain_ones() -> None:
    """Twice, of two lengths and padded; float32, so that no near tie flips."""
    torch._dynamo.reset()
    model = tiny_model("starcoder2", initializer_range=0.1)
    factorize_(model, LowRankConfig(rank=6))
    compiled = Decoder(model, max_length=MAX_LENGTH, compiled=True)
    for lengths in ((3, LENGTH), (5, 2)):
        ids = tiny_input_ids(batch=2, length=LENGTH)
        prompts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        found = compiled.generate(prompts, max_new_tokens=9, sampling=Sampling(greedy=True))
        expected = generate_tokens(model, prompts, max_new_tokens=9, sampling=Sampling(greedy=True))
        assert torch.equal(found.ids, expected.ids)


@torch.no_grad()
def test_compiled_steps_hold_weights_of_their_own() -> None:
    """What makes them fast on a CPU: constants can be packed."""
    torch._dynamo.reset()
    model = tiny_model("starcoder2", initializer_range=0.1)
    steps = GraphSteps(model, 1, MAX_LENGTH, compiled=True)
    prompt, token = tiny_input_ids(batch=1, length=LENGTH), torch.tensor([5])
    steps.prefill(prompt, None)
    before = steps.step(token).clone()
    model.model.layers[-1].mlp.c_proj.weight.mul_(3)  # which no key or value comes from
    steps.prefill(prompt, None)
    assert torch.equal(steps.step(token), before)


def test_programs_of_two_models_are_not_taken_for_each_other() -> None:
    """Programs check nothing when they are called, so each has to be found by its own decoder."""
    models = [tiny_model("gpt2"), tiny_model("gpt2")]
    torch.nn.init.normal_(models[1].get_input_embeddings().weight)
    decoders = [Decoder(model, max_length=MAX_LENGTH, compiled=True) for model in models]
    for _ in range(2):
        for model, decoder in zip(models, decoders, strict=True):
            found = decoder.generate([[3, 4]], max_new_tokens=6, sampling=Sampling(greedy=True))
            plain = generate_tokens(
                model, [[3, 4]], max_new_tokens=6, sampling=Sampling(greedy=True)
            )
            assert torch.equal(found.ids, plain.ids)


def copies_of_weights(model: PreTrainedModel) -> list[weakref.ref[Tensor]]:
    """Tensors that are packed, or have the shape of a matrix of ``model`` and are not its own."""
    gc.collect()
    own = list(model.parameters())
    shapes = {parameter.shape for parameter in own if parameter.dim() == 2}
    return [
        weakref.ref(found)
        for found in gc.get_objects()
        if type(found) is Tensor and (found.is_mkldnn or found.shape in shapes)
    ]


def test_packed_weights_go_with_their_decoder() -> None:
    """Another decoder's stay; PyTorch keeps the modules that it generated for both."""
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=1)
    before = len(copies_of_weights(model))
    decoders = [Decoder(model, max_length=MAX_LENGTH + n, compiled=True) for n in range(2)]
    texts = []
    for decoder in decoders:
        made = decoder.generate([[3, 4]], max_new_tokens=6, sampling=Sampling(greedy=True))
        texts.append(made.ids)
    both = len(copies_of_weights(model)) - before
    assert both >= 2 * len([p for p in model.parameters() if p.dim() == 2])
    del decoders[0], decoder
    assert len(copies_of_weights(model)) - before == both // 2
    found = decoders[0].generate([[3, 4]], max_new_tokens=6, sampling=Sampling(greedy=True))
    assert torch.equal(found.ids, texts[1])
    del decoders[0]
    assert len(copies_of_weights(model)) == before


def test_a_model_that_is_no_single_program_is_not_compiled() -> None:
    decoder = Decoder(tiny_model("bloom"), compiled=True)
    with pytest.raises(ConfigError, match="compiled=True: BloomForCausalLM has to be on the CPU"):
        decoder.generate([[1, 2]], max_new_tokens=2)

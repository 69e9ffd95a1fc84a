from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorlm import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    MergePolicy,
    factorize_,
    premerge_,
)
from factorlm.errors import ConfigError, NumericError
from factorlm.inference import (
    Decoder,
    Sampling,
    TokenGeneration,
    generate_tokens,
    premerged_layers,
)
from factorlm.testing.models import TINY_CONFIGS, tiny_model

GREEDY = Sampling(greedy=True)
PROMPTS = [list(range(5, 12)), [7, 8, 9], [90, 3, 55, 20, 11]]
PAD = 0
COUNT = 12


def varied_model(family: str, **fields: object) -> PreTrainedModel:
    """Large weights, so that tokens follow from the whole prefix and not from the last one."""
    return tiny_model(family, initializer_range=0.3, **fields)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return varied_model("llama")


def by_hugging_face(model: PreTrainedModel, prompts: list[list[int]], count: int) -> Tensor:
    """New tokens of one left-padded batch, (B, count)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output: Tensor = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return output[:, longest:]


ONLY_EXPERTS = {"mixtral"}
"""Its FFN has no linears that could be factorized."""
STRUCTURES = {
    "low_rank": LowRankConfig(rank=6),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=6),
}
CASES = [(family, "dense") for family in sorted(TINY_CONFIGS)] + [
    (family, structure)
    for family in sorted(set(TINY_CONFIGS) - ONLY_EXPERTS)
    for structure in STRUCTURES
]


@pytest.mark.parametrize(("family", "structure"), CASES)
def test_greedy_tokens_are_those_of_hugging_face(family: str, structure: str) -> None:
    """One row, and rows of different lengths; each row of a batch is as it is alone."""
    model = varied_model(family)
    if structure != "dense":
        factorize_(model, STRUCTURES[structure])
    decoder = Decoder(model)
    rows = []
    for prompt in PROMPTS:
        alone = decoder.generate([prompt], max_new_tokens=COUNT, sampling=GREEDY).ids
        assert torch.equal(alone, by_hugging_face(model, [prompt], COUNT))
        rows.append(alone)
    batch = decoder.generate(PROMPTS, max_new_tokens=COUNT, sampling=GREEDY).ids
    assert torch.equal(batch, by_hugging_face(model, PROMPTS, COUNT))
    assert torch.equal(batch, torch.cat(rows))


def test_models_of_the_comparison_say_various_tokens() -> None:
    """Else equal tokens would show little."""
    numbers = [
        len(generate_tokens(varied_model(f), PROMPTS, max_new_tokens=COUNT).ids.unique())
        for f in ("gpt2", "starcoder2", "mpt", "bloom", "gemma2", "falcon")
    ]
    assert min(numbers) > 8


def test_one_decoder_serves_many_calls(model: PreTrainedModel) -> None:
    """Kept memory holds nothing of an earlier call; a longer call gets more."""
    decoder = Decoder(model)
    calls = [(PROMPTS, 9), (PROMPTS[:1], 20), (PROMPTS[::-1], 5), (PROMPTS, 30), (PROMPTS[:1], 3)]
    for prompts, count in calls:
        found = decoder.generate(prompts, max_new_tokens=count, sampling=GREEDY).ids
        assert torch.equal(found, by_hugging_face(model, prompts, count))


def test_memory_is_kept_between_calls(model: PreTrainedModel) -> None:
    decoder = Decoder(model, max_length=40)
    where = set()
    for prompts in (PROMPTS, PROMPTS[::-1]):
        decoder.generate(prompts, max_new_tokens=8)
        (steps,) = decoder._kept.values()
        where.add(steps._cache.layers[0].keys.data_ptr())  # type: ignore[attr-defined]
        assert steps._cache.layers[0].keys.shape == (3, 2, 40, 8)  # type: ignore[attr-defined]
    assert len(where) == 1


@pytest.fixture
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_threads_take_turns_often")
def test_threads_with_a_decoder_each_get_the_tokens_of_one_after_the_other() -> None:
    """With one model, whose merged and packed copies the threads make as they go."""
    model = varied_model("llama")
    factorize_(model, LowRankConfig(rank=6))
    premerge_(model, MergePolicy(token_counts=(1, 2), merged=(True, False)))
    prompts = [[5 + 10 * row, 7, 90 - row] for row in range(4)]
    expected = [
        generate_tokens(model, [prompt], max_new_tokens=COUNT, sampling=GREEDY).ids.tolist()
        for prompt in prompts
    ]
    assert len({str(tokens) for tokens in expected}) == 4
    start = threading.Barrier(4)

    def generate(prompt: list[int]) -> list[list[int]]:
        start.wait()
        decoder = Decoder(model)
        return decoder.generate([prompt], max_new_tokens=COUNT, sampling=GREEDY).ids.tolist()

    for _ in range(5):
        for layer in premerged_layers(model).values():
            layer.invalidate()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(generate, prompts)) == expected
        assert all(layer.has_copy for layer in premerged_layers(model).values())


def test_rows_end_at_their_own_end_token_and_leave_pads(model: PreTrainedModel) -> None:
    free = generate_tokens(model, PROMPTS, max_new_tokens=COUNT, sampling=GREEDY)
    eos = {int(free.ids[0, 2]), int(free.ids[2, 6])}
    found = generate_tokens(
        model, PROMPTS, max_new_tokens=COUNT, sampling=GREEDY, eos_ids=eos, pad_id=98
    )
    expected = []
    for row in free.ids.tolist():
        end = next((n for n, token in enumerate(row, 1) if token in eos), COUNT)
        expected.append(row[:end])
    longest = max(map(len, expected))
    assert found.num_new_tokens == tuple(map(len, expected))
    assert found.ids.tolist() == [row + [98] * (longest - len(row)) for row in expected]
    assert min(found.num_new_tokens) < longest


def test_every_token_is_told_until_its_row_ends(model: PreTrainedModel) -> None:
    told: list[list[int]] = [[], [], []]

    def on_token(row: int, token: int) -> bool:
        told[row].append(token)
        return len(told[row]) == 2 + 3 * row

    found = generate_tokens(
        model, PROMPTS, max_new_tokens=COUNT, sampling=GREEDY, on_token=on_token
    )
    assert found.num_new_tokens == (2, 5, 8)
    assert found.ids.shape == (3, 8)
    assert told == [row[:n] for row, n in zip(found.ids.tolist(), (2, 5, 8), strict=True)]


def test_prefill_and_steps_are_timed_apart(model: PreTrainedModel) -> None:
    found = generate_tokens(model, PROMPTS, max_new_tokens=7)
    assert len(found.decode_ms) == 6
    assert min(found.prefill_seconds, *found.decode_ms) > 0
    assert found.num_prompt_tokens == (7, 3, 5)


def test_speeds() -> None:
    found = TokenGeneration(
        ids=torch.zeros(2, 4, dtype=torch.long),
        num_new_tokens=(4, 4),
        num_prompt_tokens=(6, 4),
        prefill_seconds=0.5,
        decode_ms=(10.0, 900.0, 8.0),
    )
    assert found.prefill_tokens_per_second == pytest.approx(20)
    assert found.decode_tokens_per_second == pytest.approx(100)


def test_a_single_token_has_no_decode_speed(model: PreTrainedModel) -> None:
    assert generate_tokens(model, [[5]], max_new_tokens=1).decode_tokens_per_second is None


def test_samples_are_the_seeds(model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        generate_tokens(model, PROMPTS, max_new_tokens=9, sampling=Sampling(seed=seed)).ids
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_of_one_is_greedy(model: PreTrainedModel) -> None:
    sampling = Sampling(top_k=1, temperature=3.0)
    found = generate_tokens(model, PROMPTS, max_new_tokens=9, sampling=sampling).ids
    assert torch.equal(found, by_hugging_face(model, PROMPTS, 9))


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 1, r"prompts=\[\] must have at least one row"),
        ([[5], []], 1, r"the prompts of rows \[1\] must have at least one token"),
        ([[5, 99]], 1, r"prompts\[0\]\[1\]=99 must lie in the model's vocabulary, from 0 to 98"),
        ([[5], [1, 2, -1]], 1, r"prompts\[1\]\[2\]=-1 must lie in the model's vocabulary, from 0"),
        ([[5]], 0, "max_new_tokens=0 must be at least 1"),
        ([[5] * 3], 62, "max_new_tokens=62 after a prompt of 3 tokens exceeds the model's max_pos"),
        ([[5] * 3], 18, "max_new_tokens=18 after a prompt of 3 tokens exceeds the decoder's max_l"),
    ],
)
def test_refuses(
    model: PreTrainedModel, prompts: list[list[int]], count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder(model, max_length=20).generate(prompts, max_new_tokens=count)


def test_refuses_a_base_model_and_a_wrapper(model: PreTrainedModel) -> None:
    for other in (model.base_model, torch.compile(model)):
        with pytest.raises(ConfigError, match="cannot generate: a Hugging Face causal language"):
            Decoder(other)


def test_ends_at_the_tokens_of_a_tensor(model: PreTrainedModel) -> None:
    found = generate_tokens(model, PROMPTS[:1], max_new_tokens=3, sampling=GREEDY)
    eos = found.ids[0, :1]
    ended = generate_tokens(model, PROMPTS[:1], max_new_tokens=3, sampling=GREEDY, eos_ids=eos)
    assert ended.num_new_tokens == (1,)


@pytest.mark.parametrize("pad_id", [-1, 99, None])
def test_refuses_a_pad_that_is_no_token(model: PreTrainedModel, pad_id: int) -> None:
    rule = "must lie in the model's vocabulary, from 0 to 98"
    with pytest.raises(ConfigError, match=f"pad_id={pad_id} {rule}"):
        generate_tokens(model, PROMPTS, max_new_tokens=1, pad_id=pad_id)


def test_refuses_a_model_in_training_mode() -> None:
    with pytest.raises(ConfigError, match=r"in training mode; call model\.eval\(\) first"):
        generate_tokens(tiny_model("llama").train(), PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_may_come_and_go(model: PreTrainedModel, first: bool) -> None:
    """Memory that was allocated in it could not be written outside."""
    decoder = Decoder(model, max_length=30)
    expected = by_hugging_face(model, PROMPTS, COUNT)
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            found = decoder.generate(PROMPTS, max_new_tokens=COUNT, sampling=GREEDY)
            assert torch.is_inference_mode_enabled() is inside
        assert torch.equal(found.ids, expected)
        assert not found.ids.is_inference()


def test_no_call_leaves_a_graph_of_gradients(model: PreTrainedModel) -> None:
    logits: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda *given: logits.append(given[-1]))
    with torch.enable_grad():
        generate_tokens(model, PROMPTS, max_new_tokens=3)
    hook.remove()
    assert len(logits) >= 3
    assert not any(one.requires_grad for one in logits)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=None)], ids=str)
def test_logits_that_are_not_finite_end_the_generation(sampling: Sampling) -> None:
    """By name, and what is kept serves the next call; a row that has ended does not matter."""
    model = varied_model("llama")
    free = generate_tokens(model, PROMPTS, max_new_tokens=COUNT, sampling=GREEDY).ids
    decoder, bad = Decoder(model), int(free[1, 2])
    weight = model.get_input_embeddings().weight
    sound = weight[bad].clone()
    with torch.no_grad():
        weight[bad] = torch.nan
    with pytest.raises(NumericError, match=r"logits of rows \[1\] for new token 1 are not finite"):
        decoder.generate([[5], [bad]], max_new_tokens=3, sampling=sampling)
    with torch.no_grad():
        weight[bad] = sound
    found = decoder.generate(PROMPTS, max_new_tokens=COUNT, sampling=GREEDY)
    assert torch.equal(found.ids, free)


def test_a_row_that_has_ended_may_have_any_logits() -> None:
    """Its pads are no text of the model."""
    model = varied_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[98] = torch.nan
    ended = []

    def on_token(row: int, token: int) -> bool:
        ended.append(row)
        return row == 1

    found = generate_tokens(
        model, [[5], [6]], max_new_tokens=4, sampling=GREEDY, pad_id=98, on_token=on_token
    )
    assert found.num_new_tokens == (4, 1)
    assert ended == [0, 1, 0, 0, 0]

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from factorlm.data.tokenizer_building import build_tokenizer
from factorlm.errors import ConfigError
from factorlm.inference import (
    Decoder,
    Generation,
    Sampling,
    generate_text,
    generate_texts,
    load_text_tokenizer,
)
from factorlm.testing.models import tiny_model

EOS = 256
GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer("bytes", folder, ())
    return load_text_tokenizer(folder)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Ids of ASCII letters are likely, the end of text is not."""
    model = tiny_model("llama", vocab_size=257, tie_word_embeddings=False, eos_token_id=EOS)
    with torch.no_grad():
        model.lm_head.weight[:97] = 0
        model.lm_head.weight[123:] = 0
        model.lm_head.weight[97:123] *= 30
    return model


def greedy_ids(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Without cache, streamer or generate."""
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_greedy_text_is_the_most_likely_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    streamed: list[str] = []
    found = generate_text(
        model,
        tokenizer,
        "ab c",
        max_new_tokens=20,
        sampling=Sampling(greedy=True),
        on_text=streamed.append,
    )
    expected = bytes(greedy_ids(model, [*b"ab c"], 20)).decode()
    assert found.text == expected
    assert "".join(streamed) == expected
    assert (found.num_prompt_tokens, found.num_new_tokens) == (4, 20)


def test_samples_are_the_seeds_and_leave_random_state_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    def sample(seed: int) -> str:
        return generate_text(model, tokenizer, "a", sampling=Sampling(seed=seed)).text[:40]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert sample(1) == first
    assert sample(2) != first


def test_top_k_of_one_is_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = {
        generate_text(model, tokenizer, "xy", max_new_tokens=12, sampling=sampling).text
        for sampling in (Sampling(greedy=True), Sampling(top_k=1, temperature=3.0))
    }
    assert len(texts) == 1


def test_empty_prompt_begins_a_document(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = generate_text(model, tokenizer, max_new_tokens=5, sampling=Sampling(greedy=True))
    assert found.num_prompt_tokens == 1
    assert found.text == bytes(greedy_ids(model, [EOS], 5)).decode()


def test_as_many_tokens_as_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate_text(model, tokenizer, "abc").num_new_tokens == 61
    assert generate_text(model, tokenizer, "a" * 63).num_new_tokens == 1


def test_stops_at_the_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama", vocab_size=257, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 1
        # A positive last norm makes the sum of the hidden state decide; both signs are tried.
        likely = greedy_ids(model, [97], 1)[0] == EOS
        model.lm_head.weight[EOS] = 1 if likely else -1
    found = generate_text(model, tokenizer, "a", max_new_tokens=9, sampling=Sampling(greedy=True))
    assert found.num_new_tokens == 1
    assert found.text == ""
    assert found.tokens_per_second == 1 / found.prefill_seconds


def test_stops_at_the_ends_of_the_generation_config_too(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As chat models state them: a list, of which the tokenizer has one."""
    free = greedy_ids(model, [*b"ab c"], 20)
    ends = [EOS, free[4], free[9]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    found = generate_text(model, tokenizer, "ab c", max_new_tokens=20, sampling=GREEDY)
    by_hugging_face = model.generate(torch.tensor([[*b"ab c"]]), do_sample=False, max_new_tokens=20)
    assert found.num_new_tokens == by_hugging_face.shape[1] - 4
    assert found.num_new_tokens == min(map(free.index, ends[1:])) + 1 < 20


def test_speed_is_that_of_the_median_token() -> None:
    found = Generation(
        text="",
        num_prompt_tokens=1,
        num_new_tokens=4,
        prefill_seconds=1.0,
        decode_ms=(10.0, 900.0, 8.0),
    )
    assert found.tokens_per_second == pytest.approx(100)
    assert found.seconds == pytest.approx(1.918)


def test_every_token_is_timed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = generate_text(model, tokenizer, "a", max_new_tokens=7)
    assert len(found.decode_ms) == found.num_new_tokens - 1 == 6
    assert min(found.decode_ms) > 0
    assert found.prefill_seconds > 0


def test_refuses_what_does_not_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens=62 after a prompt of 3 tokens exceeds"):
        generate_text(model, tokenizer, "abc", max_new_tokens=62)
    with pytest.raises(ConfigError, match="max_new_tokens=0 must be at least 1"):
        generate_text(model, tokenizer, max_new_tokens=0)
    with pytest.raises(ConfigError, match="max_new_tokens=1 after a prompt of 64 tokens exceeds"):
        generate_text(model, tokenizer, "a" * 64)


def test_batch_is_its_rows_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["ab c", "", "a longer prompt", "x"]
    streamed = [""] * len(prompts)

    def on_text(row: int, text: str) -> None:
        streamed[row] += text

    found = generate_texts(
        model, tokenizer, prompts, max_new_tokens=15, sampling=GREEDY, on_text=on_text
    )
    alone = [
        generate_text(model, tokenizer, prompt, max_new_tokens=15, sampling=GREEDY)
        for prompt in prompts
    ]
    assert [one.text for one in found] == [one.text for one in alone] == streamed
    assert [one.num_prompt_tokens for one in found] == [4, 1, 15, 1]
    assert len({one.prefill_seconds for one in found}) == 1


def test_each_row_ends_at_its_first_stop_string(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["ab c", "hello", "x"]
    free = [
        one.text
        for one in generate_texts(model, tokenizer, prompts, max_new_tokens=30, sampling=GREEDY)
    ]
    stop = (free[0][5:8], free[1][11:14])
    streamed = [""] * len(prompts)

    def on_text(row: int, text: str) -> None:
        streamed[row] += text

    found = generate_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=30,
        sampling=GREEDY,
        stop=stop,
        on_text=on_text,
    )
    for text, one, seen in zip(free, found, streamed, strict=True):
        places = [text.index(string) for string in stop if string in text]
        end = min(places, default=len(text))
        assert one.text == seen == text[:end]
        assert one.num_new_tokens == (end + 3 if places else 30)
        assert len(one.decode_ms) == one.num_new_tokens - 1
    assert len({one.num_new_tokens for one in found}) > 1


def test_no_prompt_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"prompts=\[\] must have at least one row"):
        generate_texts(model, tokenizer, [])


def test_text_goes_on_from_its_prompt() -> None:
    """With a decoder that strips the space before the first token that it gets, as Llama 2's."""
    words = {"<unk>": 0} | {f"▁w{place}": place for place in range(1, 99)}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")
    model = tiny_model("llama", initializer_range=0.3, eos_token_id=None)
    prompts = ["w5 w7", "w9"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert ids == [[5, 7], [9]]
    streamed = list(prompts)

    def on_text(row: int, text: str) -> None:
        streamed[row] += text

    found = generate_texts(
        model, tokenizer, prompts, max_new_tokens=6, sampling=GREEDY, on_text=on_text
    )
    for row, prompt in enumerate(prompts):
        whole = tokenizer.decode([*ids[row], *greedy_ids(model, ids[row], 6)])
        assert prompt + found[row].text == streamed[row] == whole
        assert found[row].text.startswith(" w")


def lengths_of_forwards(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of tokens a row of every forward to come."""
    found: list[int] = []
    forward = model.forward

    @functools.wraps(forward)
    def counted(*args: Any, **given: Any) -> Any:
        found.append(given["input_ids"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(model, "forward", counted)
    return found


def test_a_prompt_is_computed_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new decoder makes its memory with a single token; one that is kept has it."""
    lengths = lengths_of_forwards(model, monkeypatch)
    generate_text(model, tokenizer, "ab c", max_new_tokens=3)
    assert lengths == [1, 4, 1, 1]
    decoder = Decoder(model, max_length=40)
    for expected in ([1, 4, 1, 1], [4, 1, 1], [4, 1, 1]):
        lengths.clear()
        generate_text(model, tokenizer, "ab c", max_new_tokens=3, decoder=decoder)
        assert lengths == expected


def test_a_decoder_that_is_kept_gives_the_same_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    decoder = Decoder(model, max_length=30)
    for prompts in (["ab c", "x"], ["hello"], ["x", "ab c"]):
        found = generate_texts(model, tokenizer, prompts, sampling=GREEDY, decoder=decoder)
        free = generate_texts(model, tokenizer, prompts, sampling=GREEDY, max_new_tokens=29)
        longest = max(map(len, prompts))
        assert [one.text for one in found] == [one.text[: 30 - longest] for one in free]
        assert {one.num_new_tokens for one in found} == {30 - longest}


def test_a_decoder_of_another_model_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = Decoder(tiny_model("llama", vocab_size=257))
    with pytest.raises(ConfigError, match="decoder must be one of the model that is given"):
        generate_text(model, tokenizer, "a", decoder=other)

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from factorlm.errors import ConfigError
from factorlm.inference import Sampling
from factorlm.inference.sampling import LIKELY_TOKENS, NO_TOKEN, Sampler, filter_logits

CPU = torch.device("cpu")


def random_logits(*shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """By Hugging Face's warpers, in the order of its ``generate``."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits


@pytest.mark.parametrize("vocab", [7, 99, 3 * LIKELY_TOKENS])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=3.0, top_p=None),
        Sampling(top_k=5, top_p=None),
        Sampling(top_k=20, top_p=0.7, temperature=1.7),
        Sampling(top_p=0.01),
        Sampling(top_p=1.0, top_k=10_000),
        Sampling(top_p=0.999, temperature=100.0),
    ],
    ids=str,
)
def test_filters_are_those_of_hugging_face(vocab: int, sampling: Sampling) -> None:
    logits = random_logits(4, vocab)
    expected = warped(logits.clone(), sampling)
    assert torch.equal(filter_logits(logits, sampling), expected)
    assert bool(expected.isfinite().any(dim=-1).all())


def test_flat_rows_need_the_whole_sort_and_peaked_ones_do_not() -> None:
    """One flat row among peaked ones: the short search does not reach its nucleus."""
    logits = random_logits(3, 4 * LIKELY_TOKENS)
    logits[1] *= 1e-3
    sampling = Sampling(temperature=1.0, top_p=0.9)
    found = filter_logits(logits, sampling)
    assert int(found[1].isfinite().sum()) > LIKELY_TOKENS
    assert torch.equal(found, warped(logits.clone(), sampling))


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for sampling in (
        Sampling(temperature=1.0, top_k=2, top_p=None),
        Sampling(temperature=1.0, top_p=0.7),
    ):
        assert filter_logits(logits, sampling).isfinite().tolist() == [[True, True, True, False]]


def test_draws_follow_the_softmax() -> None:
    """20,000 draws: each share lies within five standard deviations of its probability."""
    logits = random_logits(1, 6, scale=1.0)
    sampling = Sampling(temperature=0.7, top_p=None)
    draw = Sampler(sampling, CPU)
    count = 20_000
    drawn = draw(logits.expand(count, -1)).bincount(minlength=6) / count
    probability = (logits[0] / 0.7).softmax(dim=-1)
    deviation = (probability * (1 - probability) / count).sqrt()
    assert bool(((drawn - probability).abs() < 5 * deviation).all())


def test_what_was_filtered_is_never_drawn() -> None:
    logits = random_logits(1, 50).expand(5000, -1)
    allowed = set(logits[0].topk(3).indices.tolist())
    drawn = set(Sampler(Sampling(top_k=3, temperature=5.0), CPU)(logits).tolist())
    assert drawn == allowed


def test_draws_are_the_seeds_and_leave_the_global_state_alone() -> None:
    logits = random_logits(8, 50)
    before = torch.get_rng_state()
    first, again, other = (
        Sampler(Sampling(seed=seed, temperature=5.0), CPU)(logits) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_takes_the_most_likely() -> None:
    logits = random_logits(8, 50).bfloat16()
    assert torch.equal(Sampler(Sampling(greedy=True), CPU)(logits), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan must be above 0"),
        ({"temperature": math.inf}, "temperature=inf must be above 0 .* and finite"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 1.5}, r"top_p=1\.5 must lie in"),
    ],
)
def test_names_a_wrong_field(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)  # type: ignore[arg-type]


SAMPLINGS = [Sampling(greedy=True), Sampling(), Sampling(top_k=3), Sampling(top_p=None)]


@pytest.mark.parametrize("vocab", [50, 2 * LIKELY_TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_no_token_where_logits_are_not_finite(
    sampling: Sampling, dtype: torch.dtype, vocab: int
) -> None:
    """One NaN, all NaN, an infinity, nothing but minus infinity; and a row that is sound, with
    tokens that may not be said."""
    logits = random_logits(5, vocab).to(dtype)
    logits[0, 7] = torch.nan
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    logits[4, 10:] = -torch.inf
    *wrong, sound = Sampler(sampling, CPU)(logits).tolist()
    assert wrong == [NO_TOKEN] * 4
    assert 0 <= sound < 10


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-9, 1e-25, 1e-35, 1e-40, 1e-320])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.9), (5, 0.9)])
def test_hardly_any_temperature_takes_the_most_likely(
    temperature: float, top_k: int | None, top_p: float | None, scale: float
) -> None:
    logits = random_logits(8, 50, scale=scale)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(Sampler(sampling, CPU)(logits), logits.argmax(dim=-1))

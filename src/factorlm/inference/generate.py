"""Generate text with Hugging Face's ``generate``, streamed and timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from factorlm.config import Config, check
from factorlm.errors import CheckpointError

DEFAULT_NEW_TOKENS = 200
WARM_UP_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen from the model's distribution."""

    greedy: bool = False
    """Always the most likely token; the other fields mean nothing then."""
    temperature: float = 0.8
    top_k: int | None = None
    """Only among the k most likely tokens; None: all."""
    top_p: float | None = 0.95
    """Only among the most likely tokens that hold this probability together; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        rule = "must be above 0 (greedy takes the most likely token)"
        check(self.temperature > 0, f"temperature={self.temperature} {rule}")
        check(self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be at least 1")
        top_p = self.top_p
        check(top_p is None or 0 < top_p <= 1, f"top_p={top_p} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A text that a model went on with, and how long it took."""

    text: str
    """Without the prompt."""
    num_prompt_tokens: int
    num_new_tokens: int
    prefill_seconds: float
    """Until the first new token."""
    decode_ms: tuple[float, ...]
    """Of each later token, (num_new_tokens - 1)."""

    @property
    def seconds(self) -> float:
        """From the prompt to the last token."""
        return self.prefill_seconds + sum(self.decode_ms) / 1000

    @property
    def tokens_per_second(self) -> float:
        """At the median later token; of a single token, by its own time."""
        if not self.decode_ms:
            return self.num_new_tokens / self.prefill_seconds
        return 1000 / statistics.median(self.decode_ms)


def load_text_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model's folder. Raises ``CheckpointError`` if there is none."""
    folder = Path(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no tokenizer that can be opened: {error}") from error


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Go on with ``prompt`` until the end-of-text token or ``max_new_tokens``.

    None stands for 200 tokens, or as many as the model has positions for; an empty prompt begins
    a new document. ``on_text`` gets the new text as it comes. A short generation before warms up,
    so that times are those of a process that serves. Raises ``ConfigError`` where the tokens do
    not fit the model's positions.
    """
    prompt_ids = _encode(tokenizer, prompt).to(model.device)
    num_prompt_tokens = prompt_ids.shape[1]
    count = _num_new_tokens(model, num_prompt_tokens, max_new_tokens)
    config = _generation_config(model, tokenizer, sampling or Sampling(), count)
    warm_up_count = min(count, WARM_UP_TOKENS)
    warm_up = _generation_config(model, tokenizer, Sampling(greedy=True), warm_up_count)
    timer = _TimedStreamer(tokenizer, on_text)
    with torch.random.fork_rng(), torch.no_grad():
        _run(model, prompt_ids, warm_up, None)
        torch.manual_seed((sampling or Sampling()).seed)
        timer.start()
        ids = _run(model, prompt_ids, config, timer)
    new_ids = ids[0, num_prompt_tokens:]
    return Generation(
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)),
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=len(new_ids),
        prefill_seconds=timer.token_seconds[0],
        decode_ms=tuple(1000 * seconds for seconds in timer.token_seconds[1:]),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    check(ids[0] is not None, f"prompt={prompt!r} has no token, and the tokenizer no eos_token")
    return torch.tensor([ids])


def _num_new_tokens(model: PreTrainedModel, num_prompt_tokens: int, wanted: int | None) -> int:
    """How many tokens to generate at most; raises ``ConfigError`` if they do not fit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if limit is None else limit - num_prompt_tokens
    if wanted is None:
        wanted = DEFAULT_NEW_TOKENS if room is None else max(1, min(DEFAULT_NEW_TOKENS, room))
    check(wanted >= 1, f"max_new_tokens={wanted} must be at least 1")
    check(
        room is None or wanted <= room,
        f"max_new_tokens={wanted} after a prompt of {num_prompt_tokens} tokens exceeds the "
        f"model's max_position_embeddings={limit}",
    )
    return wanted


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    max_new_tokens: int,
) -> GenerationConfig:
    own = model.generation_config
    eos = tokenizer.eos_token_id
    if eos is None:
        eos = None if own is None else own.eos_token_id
    chosen = (
        {}
        if sampling.greedy
        else {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        }
    )
    return GenerationConfig(
        do_sample=not sampling.greedy,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos[0] if isinstance(eos, list) else eos,
        **chosen,
    )


def _run(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    config: GenerationConfig,
    streamer: TextStreamer | None,
) -> Tensor:
    output: Tensor = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        generation_config=config,
        streamer=streamer,
    )
    return output


class _TimedStreamer(TextStreamer):
    """Hands text on as it comes, and notes when each token did."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.token_seconds: list[float] = []
        """Time of each new token since the one before, or since ``start``."""
        self._on_text = on_text
        self._since = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            now = time.perf_counter()
            self.token_seconds.append(now - self._since)
            self._since = now
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)

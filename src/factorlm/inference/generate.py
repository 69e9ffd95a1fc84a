"""Generate text: prompts in, their continuations out, streamed and timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorlm.config import check
from factorlm.inference.decoder import Decoder, TokenGeneration, check_room, room
from factorlm.inference.sampling import Sampling
from factorlm.inference.text import TextStream

DEFAULT_NEW_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A text that a model went on with, and how long it took."""

    text: str
    """Without the prompt, and up to the stop string that ended it."""
    num_prompt_tokens: int
    num_new_tokens: int
    """Those that ended the text count."""
    prefill_seconds: float
    """Until the first new token; of a batch, the first of all rows."""
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


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    decoder: Decoder | None = None,
) -> Generation:
    """Go on with one prompt; ``on_text`` gets the new text as it comes. See ``generate_texts``."""
    (found,) = generate_texts(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        on_text=None if on_text is None else lambda row, text: on_text(text),
        decoder=decoder,
    )
    return found


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    decoder: Decoder | None = None,
) -> list[Generation]:
    """Go on with each prompt, all in one batch, until an end-of-text token (the tokenizer's, or
    one of the model's generation config), a string of ``stop`` or ``max_new_tokens``.

    None stands for 200 tokens, or as many as the model or the decoder has room for; an empty
    prompt begins a new document. A stop string is not part of the text. ``on_text`` gets a row and
    its new text as it comes. ``decoder`` is one of ``model`` that is kept for many calls; None: a
    new one.

    Raises ``ConfigError`` where the tokens do not fit the model's positions, and what
    ``Decoder.generate`` raises.
    """
    decoder = decoder or Decoder(model)
    check(decoder.model is model, "decoder must be one of the model that is given")
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids), default=0)
    streams = [
        TextStream(tokenizer, stop, _of_row(on_text, row), prompt) for row, prompt in enumerate(ids)
    ]
    done = decoder.generate(
        ids,
        max_new_tokens=_num_new_tokens(decoder, longest, max_new_tokens),
        sampling=sampling,
        eos_ids=_eos_ids(model, tokenizer),
        on_token=lambda row, token: streams[row].add(token),
    )
    for stream in streams:
        stream.finish()
    return [_generation(done, row, stream.text) for row, stream in enumerate(streams)]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    check(ids[0] is not None, f"prompt={prompt!r} has no token, and the tokenizer no eos_token")
    return ids


def _num_new_tokens(decoder: Decoder, num_prompt_tokens: int, wanted: int | None) -> int:
    """How many tokens to generate at most; raises ``ConfigError`` if they do not fit."""
    if wanted is None:
        free = room(decoder.model, num_prompt_tokens)
        own = None if decoder.max_length is None else decoder.max_length - num_prompt_tokens
        limits = (DEFAULT_NEW_TOKENS, free, own)
        wanted = max(1, min(limit for limit in limits if limit is not None))
    check_room(decoder.model, num_prompt_tokens, wanted)
    return wanted


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end of text, and all that the model's generation config ends at."""
    own = model.generation_config
    given = [tokenizer.eos_token_id, None if own is None else own.eos_token_id]
    ids = (one for eos in given for one in (eos if isinstance(eos, list) else [eos]))
    return {one for one in ids if one is not None}


def _of_row(on_text: Callable[[int, str], None] | None, row: int) -> Callable[[str], None] | None:
    return None if on_text is None else lambda text: on_text(row, text)


def _generation(done: TokenGeneration, row: int, text: str) -> Generation:
    count = done.num_new_tokens[row]
    return Generation(
        text=text,
        num_prompt_tokens=done.num_prompt_tokens[row],
        num_new_tokens=count,
        prefill_seconds=done.prefill_seconds,
        decode_ms=done.decode_ms[: count - 1],
    )

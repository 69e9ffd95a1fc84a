"""Go on with token ids: the loop around a model, without tokenizer or text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorlm.config import check
from factorlm.errors import NumericError
from factorlm.inference.attention import use_decode_attention
from factorlm.inference.graph import GraphSteps, can_capture, can_compile
from factorlm.inference.sampling import NO_TOKEN, Sampler, Sampling
from factorlm.inference.steps import Steps, plain_steps, takes_cache

OnToken = Callable[[int, int], bool]
"""Gets a row and its new token; returns whether the row is to end with it."""


@dataclass(frozen=True, kw_only=True)
class TokenGeneration:
    """Tokens that a model went on with, and how long they took."""

    ids: Tensor
    """(B, most new tokens), int64, on the CPU, without the prompts. A row that ended before the
    others is filled up with the pad token."""
    num_new_tokens: tuple[int, ...]
    """Of each row; the token that ended it counts."""
    num_prompt_tokens: tuple[int, ...]
    """Of each row, without padding."""
    prefill_seconds: float
    """Until the first new token of all rows, once memory, graph and program are there."""
    decode_ms: tuple[float, ...]
    """Of each later step, which adds one token to every row; what ``on_token`` does
    with it is left out."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows, padding left out."""
        return sum(self.num_prompt_tokens) / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of one row, at the median step; None where there was none."""
        return 1000 / statistics.median(self.decode_ms) if self.decode_ms else None


class Decoder:
    """Generates with one model, again and again: caches and CUDA graphs are kept between calls.

    ``model`` is a causal language model in eval mode. ``max_length`` is how many tokens a row may
    have, prompt included; None: as many as a call needs, and a call that needs more than those
    before it allocates anew. A CUDA graph is captured once for each batch size, and again for a
    generation that finds weights elsewhere (``to``, ``load_state_dict(assign=True)``) or copies of
    ``premerge_`` dropped. After a change of the layers themselves (``premerge_``) make a new
    ``Decoder``. ``cuda_graph=False`` is for a model whose own code cannot be captured.

    Raises ``ConfigError`` for what is no such model, a base model and a wrapper included.

    One object serves one thread at a time; threads that share a model take a ``Decoder`` each.

    ``compiled=True``, on a CPU, compiles the step of a token at the first one, which takes seconds
    and a C++ compiler, for each batch size; it then runs without Python's part. The program holds
    a packed copy of all weights: after any change of one, make a new ``Decoder``.

    On a CPU it sets the ``attn_implementation`` of a model that has ``sdpa`` to ``factorlm_sdpa``,
    the same in all but a single token in half precision, which it attends with faster.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_length: int | None = None,
        cuda_graph: bool = True,
        compiled: bool = False,
    ) -> None:
        _check_model(model)
        self.model = model
        self.max_length = max_length
        self._cuda_graph = cuda_graph
        self._compiled = compiled
        self._kept: dict[tuple[object, ...], Steps] = {}
        use_decode_attention(model)

    @torch.inference_mode(False)  # what is kept has to serve callers outside of it too
    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        pad_id: int = 0,
        on_token: OnToken | None = None,
    ) -> TokenGeneration:
        """Go on with each prompt until a token of ``eos_ids``, ``on_token`` or ``max_new_tokens``.

        Prompts of different lengths are padded on the left; a row's greedy tokens are those that
        it has alone. Samples depend on the seed and on the number of rows; the global random
        state is neither read nor changed. Raises ``ConfigError`` for an empty prompt, an id
        that is no token of the model, too many tokens, or a model in training mode. Raises
        ``NumericError`` for logits that are not finite.
        """
        self._check(prompts, max_new_tokens, pad_id)
        sampling = sampling or Sampling()
        device = self.model.device
        longest = max(len(prompt) for prompt in prompts)
        steps = self._steps(len(prompts), longest + max_new_tokens)
        ids, num_pads = _pad_left(prompts, pad_id, device)  # waits for what ``_steps`` began
        rows = _Rows(len(prompts), frozenset(map(int, eos_ids)), pad_id, on_token, device)
        choose = Sampler(sampling, device)
        seconds: list[float] = []
        since = time.perf_counter()
        logits = steps.prefill(ids, num_pads)
        while True:
            tokens = rows.pad(choose(logits))
            new = tokens.tolist()  # waits for the device
            seconds.append(time.perf_counter() - since)
            rows.add(new)
            if rows.num_open == 0 or len(seconds) == max_new_tokens:
                break
            since = time.perf_counter()  # what ``on_token`` does is no part of a step
            logits = steps.step(tokens)
        return TokenGeneration(
            ids=torch.tensor(rows.steps).T,
            num_new_tokens=tuple(length or len(seconds) for length in rows.lengths),
            num_prompt_tokens=tuple(len(prompt) for prompt in prompts),
            prefill_seconds=seconds[0],
            decode_ms=tuple(1000 * one for one in seconds[1:]),
        )

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int) -> None:
        check(len(prompts) > 0, "prompts=[] must have at least one row")
        empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
        check(not empty, f"the prompts of rows {empty} must have at least one token")
        self._check_ids(prompts, pad_id)
        length = max(len(prompt) for prompt in prompts)
        check_room(self.model, length, max_new_tokens)
        check(
            self.max_length is None or length + max_new_tokens <= self.max_length,
            f"max_new_tokens={max_new_tokens} after a prompt of {length} tokens exceeds the "
            f"decoder's max_length={self.max_length}",
        )
        check(not self.model.training, "the model is in training mode; call model.eval() first")

    def _check_ids(self, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        limit = self.model.get_input_embeddings().num_embeddings
        rule = f"must lie in the model's vocabulary, from 0 to {limit - 1}"
        check(pad_id is not None and 0 <= pad_id < limit, f"pad_id={pad_id} {rule}")
        wrong = [
            f"prompts[{row}][{place}]={token}"
            for row, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
            if not 0 <= token < limit
        ]
        check(not wrong, f"{', '.join(wrong[:8])} {rule}")

    def _steps(self, batch: int, length: int) -> Steps:
        """What was kept from a call with as many rows, if it is long enough and still right."""
        key = (batch, self.model.dtype, self.model.device)
        kept = self._kept.get(key)
        if kept is None or kept.max_length < length or not kept.is_current():
            del kept  # with all of its memory, before more is asked for
            self._kept.pop(key, None)
            kept = self._make_steps(batch, self.max_length or length)
            # Allocates, compiles and makes copies of weights: no part of a call's time.
            kept.prefill(torch.zeros(batch, 1, dtype=torch.long, device=self.model.device), None)
            self._kept[key] = kept
        return kept

    def _make_steps(self, batch: int, length: int) -> Steps:
        if self._compiled:
            check(
                takes_cache(self.model) and can_compile(self.model, length),
                f"compiled=True: {type(self.model).__name__} has to be on the CPU, and a step of "
                "it the same at every length",
            )
            return GraphSteps(self.model, batch, length, compiled=True)
        if self._cuda_graph and takes_cache(self.model) and can_capture(self.model, length):
            return GraphSteps(self.model, batch, length)
        return plain_steps(self.model, length)


def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    pad_id: int = 0,
    on_token: OnToken | None = None,
) -> TokenGeneration:
    """Generate once; see ``Decoder.generate``, which keeps its memory between calls."""
    return Decoder(model).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        on_token=on_token,
    )


def room(model: PreTrainedModel, num_prompt_tokens: int) -> int | None:
    """How many tokens fit after a prompt, at least 0; None: the model states no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else max(0, limit - num_prompt_tokens)


def check_room(model: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ``ConfigError`` unless so many new tokens, at least one, fit the model's positions."""
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    free = room(model, num_prompt_tokens)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check(
        free is None or max_new_tokens <= free,
        f"max_new_tokens={max_new_tokens} after a prompt of {num_prompt_tokens} tokens exceeds the "
        f"model's max_position_embeddings={limit}",
    )


def _check_model(model: object) -> None:
    """Raise ``ConfigError`` unless ``model`` is a causal language model with a head, unwrapped."""
    check(
        isinstance(model, PreTrainedModel) and model.can_generate(),
        f"{type(model).__name__} cannot generate: a Hugging Face causal language model is needed, "
        "not its base model nor a wrapper",
    )


def _pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Ids (B, longest) and the number of pads (B,), which is None where there are none."""
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[pad_id] * count + list(prompt) for count, prompt in zip(pads, prompts, strict=True)]
    ids = torch.tensor(rows, device=device)
    return ids, torch.tensor(pads, device=device) if any(pads) else None


class _Rows:
    """Which rows still go on, and the tokens of every step."""

    def __init__(
        self,
        batch: int,
        eos_ids: frozenset[int],
        pad_id: int,
        on_token: OnToken | None,
        device: torch.device,
    ) -> None:
        self.steps: list[list[int]] = []
        self.lengths: list[int | None] = [None] * batch
        """Number of new tokens of a row that has ended."""
        self.num_open = batch
        self._eos_ids, self._pad_id, self._on_token = eos_ids, pad_id, on_token
        self._ended = torch.zeros(batch, dtype=torch.bool, device=device)

    def pad(self, tokens: Tensor) -> Tensor:
        """Tokens (B,) with the pad token in rows that have ended."""
        if self.num_open == len(self.lengths):
            return tokens
        return tokens.masked_fill(self._ended, self._pad_id)

    def add(self, new: list[int]) -> None:
        """Take the tokens of a step, and end the rows that end with theirs."""
        self._check(new)
        self.steps.append(new)
        for row, token in enumerate(new):
            if self.lengths[row] is None and self._ends(row, token):
                self.lengths[row] = len(self.steps)
                self.num_open -= 1
                self._ended[row] = True

    def _check(self, new: list[int]) -> None:
        bad = [row for row, token in enumerate(new) if token == NO_TOKEN]
        if bad:
            raise NumericError(
                f"the logits of rows {bad} for new token {len(self.steps) + 1} are not finite: "
                "weights that are not, or values beyond the range of the model's dtype"
            )

    def _ends(self, row: int, token: int) -> bool:
        asked = self._on_token is not None and self._on_token(row, token)
        return asked or token in self._eos_ids

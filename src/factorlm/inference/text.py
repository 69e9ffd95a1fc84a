"""From tokens to text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from factorlm.config import check
from factorlm.errors import CheckpointError

UNFINISHED = "\ufffd"
"""What a tokenizer writes for the bytes of a character that is not whole yet."""
NUM_CONTEXT = 16
"""Ids of the prompt that are decoded again with the first new ones: more than the special tokens,
which are no text, that a prompt ends with."""


def load_text_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model's folder. Raises ``CheckpointError`` if there is none."""
    folder = Path(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no tokenizer that can be opened: {error}") from error


class TextStream:
    """The new text of one row.

    Tokens are decoded from a little before the first that is not text yet, since what a token
    means may depend on the one before it. Text that may be the beginning of a stop string waits.
    ``on_text`` gets pieces that together are ``text``. ``prompt`` is the ids that the text goes on
    from: some tokenizers strip the space before the first token that they decode. Raises
    ``ConfigError`` for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        check(all(stop), f"stop={list(stop)!r} must have no empty string")
        self.text = ""
        """Up to the stop string that was found; up to the last whole character while it grows."""
        self.stopped = False
        """A stop string was found."""
        self._tokenizer, self._stop, self._on_text = tokenizer, tuple(stop), on_text
        self._ids = list(prompt[-NUM_CONTEXT:])
        self._context = 0
        """Decoding begins here."""
        self._read = len(self._ids)
        """Tokens before this one are in ``text``."""
        self._num_given = 0

    def add(self, token: int) -> bool:
        """Take the next token; returns whether a stop string is complete."""
        self._ids.append(token)
        new = self._new_text()
        if new and not new.endswith(UNFINISHED):
            self._context, self._read = self._read, len(self._ids)
            self._take(new)
        return self.stopped

    def finish(self) -> None:
        """No more tokens come: what waited is text."""
        if not self.stopped:
            self._take(self._new_text())
            self._give(len(self.text))

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _take(self, new: str) -> None:
        before = len(self.text)
        self.text += new
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        places = [place for place in found if place >= 0]
        if places:
            self.stopped = True
            self.text = self.text[: min(places)]
        self._give(len(self.text) - (0 if self.stopped else self._num_waiting()))

    def _num_waiting(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-count:]) for stop in self._stop):
                return count
        return 0

    def _give(self, end: int) -> None:
        piece = self.text[self._num_given : end]
        if piece and self._on_text is not None:
            self._on_text(piece)
        self._num_given = max(self._num_given, end)

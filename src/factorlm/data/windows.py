"""Every token of a split once, in order, for evaluation."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from factorlm.config import check
from factorlm.data.dataset import TokenDataset, TokenStream
from factorlm.data.splits import VALIDATION
from factorlm.errors import DataError

IGNORED = -100
"""Target that no loss is taken of, as in PyTorch and Hugging Face."""


@dataclass(frozen=True)
class EvalBatch:
    """Windows to evaluate together; both arrays are int64 of shape (rows, context_length)."""

    inputs: npt.NDArray[np.int64]
    """Padded with the end-of-document id."""
    targets: npt.NDArray[np.int64]
    """The next id of each input; padded with -100."""

    @property
    def num_targets(self) -> int:
        """Ids that are predicted."""
        return int((self.targets != IGNORED).sum())


class EvalWindows:
    """Iterates over every non-overlapping window of a split, the last partial one included.

    Window k of a source predicts ids k·L + 1 to k·L + L from those before them in the window, so
    each id but a source's first is a target once. With several ranks, all of them get the same
    number of batches (collectives inside the model need that), some perhaps of padding alone.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        split: str = VALIDATION,
        *,
        context_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``batch_size`` is the number of windows of one rank.

        Raises ``DataError`` if the split has nothing to predict.
        """
        check(context_length >= 1, f"context_length={context_length} must be >= 1")
        check(batch_size >= 1, f"batch_size={batch_size} must be >= 1")
        check(0 <= rank < world_size, f"rank={rank} must be in [0, world_size={world_size})")
        found = dataset.split(split)
        self.context_length = context_length
        self.num_targets = sum(max(stream.num_tokens - 1, 0) for stream in found.streams)
        """Ids that are predicted, over all ranks."""
        self.num_text_bytes = found.num_text_bytes
        """UTF-8 bytes of the split's text: bits per byte = nats / ln 2 / bytes."""
        if self.num_targets == 0:
            raise DataError(f"{dataset.path}: split '{split}' has no token to predict")
        self._streams = found.streams
        counts = (-(-(stream.num_tokens - 1) // context_length) for stream in found.streams)
        self._ends = list(itertools.accumulate(counts))
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._eos_id = dataset.eos_id

    @property
    def num_windows(self) -> int:
        """Over all ranks."""
        return self._ends[-1]

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return -(-self.num_windows // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[EvalBatch]:
        for step in range(len(self)):
            start = (step * self._world_size + self._rank) * self._batch_size
            yield self._read(range(start, min(start + self._batch_size, self.num_windows)))

    def _place(self, window: int) -> tuple[TokenStream, int]:
        """The stream of a window and its first position there."""
        source = bisect.bisect_right(self._ends, window)
        first = self._ends[source - 1] if source else 0
        return self._streams[source], (window - first) * self.context_length

    def _read(self, windows: range) -> EvalBatch:
        shape = (max(len(windows), 1), self.context_length)
        inputs = np.full(shape, self._eos_id, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        for row, (stream, start) in enumerate(map(self._place, windows)):
            count = min(self.context_length, stream.num_tokens - 1 - start)
            ids = stream.read(start, count + 1)
            inputs[row, :count] = ids[:-1]
            targets[row, :count] = ids[1:]
        return EvalBatch(inputs, targets)

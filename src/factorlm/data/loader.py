"""The stream of training batches, as a pure function of seed and step.

Block k of a source covers ids [k·L, k·L + L]: L + 1 of them, so that every id but the first is
predicted exactly once, whatever document it is in. An epoch is a list of blocks: from a source of
weight w and n blocks it takes round(w·n), walking through seeded permutations of the n that go on
from epoch to epoch; the blocks of all sources are then mixed by another seeded permutation. Nothing
is kept between steps but a buffer, so any step, rank and world size reads its part directly.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from factorlm.config import check
from factorlm.data.dataset import TokenDataset, TokenStream
from factorlm.data.permutation import permute
from factorlm.data.splits import TRAIN
from factorlm.errors import DataError

LOOK_AHEAD = 4096
"""Block ids computed at once: it makes the cost per step negligible."""

Ids = npt.NDArray[np.int64]


class TokenLoader:
    """Batches of a split for one rank."""

    def __init__(
        self,
        dataset: TokenDataset,
        split: str = TRAIN,
        *,
        context_length: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``sequences_per_step`` counts over all ranks and is a multiple of ``world_size``.

        Raises ``ConfigError`` for sizes that do not fit together, ``DataError`` if a source has
        less than one block.
        """
        check(context_length >= 1, f"context_length={context_length} must be >= 1")
        divides = sequences_per_step >= 1 and sequences_per_step % world_size == 0
        rule = f"must be a positive multiple of world_size={world_size}"
        check(divides, f"sequences_per_step={sequences_per_step} {rule}")
        check(0 <= rank < world_size, f"rank={rank} must be in [0, world_size={world_size})")
        self.context_length = context_length
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        self.local_size = sequences_per_step // world_size
        """Sequences of this rank in a step."""
        self._first = rank * self.local_size
        self._dtype = dataset.dtype
        self._streams = dataset.split(split).streams
        self._num_blocks = [
            count_blocks(stream, context_length, dataset, split) for stream in self._streams
        ]
        self._taken = [
            max(round(stream.weight * blocks), 1)
            for stream, blocks in zip(self._streams, self._num_blocks, strict=True)
        ]
        self._starts = [0, *itertools.accumulate(self._num_blocks)]
        self._window: Ids = np.empty(0, dtype=np.int64)
        self._window_start = 0

    @property
    def blocks_per_epoch(self) -> int:
        """Sequences in an epoch, the weights of the sources included."""
        return sum(self._taken)

    @property
    def tokens_per_step(self) -> int:
        """Ids that are predicted in a step, over all ranks."""
        return self.sequences_per_step * self.context_length

    def epoch(self, step: int) -> float:
        """How many epochs are done before ``step`` (0-based)."""
        return step * self.sequences_per_step / self.blocks_per_epoch

    def batch_ids(self, step: int) -> Ids:
        """Block ids of this rank in ``step`` (0-based), shape (local_size,).

        A block's id counts over the blocks of all sources, in the order of the sources.
        """
        check(step >= 0, f"step={step} must be >= 0")
        start = step * self.sequences_per_step + self._first
        stop = start + self.local_size
        window_stop = self._window_start + len(self._window)
        if not self._window_start <= start <= stop <= window_stop:
            count = max(LOOK_AHEAD, self.local_size)
            self._window = self._blocks_at(np.arange(start, start + count))
            self._window_start = start
        return self._window[start - self._window_start : stop - self._window_start].copy()

    def batch(self, step: int) -> Ids:
        """Ids of this rank in ``step`` (0-based), shape (local_size, context_length + 1).

        Inputs are ``[:, :-1]``, targets ``[:, 1:]``. Reads these ids and nothing else.
        """
        blocks = self.batch_ids(step)
        out = np.empty((len(blocks), self.context_length + 1), dtype=self._dtype)
        sources = np.searchsorted(self._starts, blocks, side="right") - 1
        for row, block, source in zip(out, blocks.tolist(), sources.tolist(), strict=True):
            start = (block - self._starts[source]) * self.context_length
            self._streams[source].read_into(start, row)
        return out.astype(np.int64)

    def _blocks_at(self, positions: Ids) -> Ids:
        """Block ids at positions of the endless stream of sequences, any shape (n,)."""
        blocks = np.empty_like(positions)
        epochs, places = np.divmod(positions, self.blocks_per_epoch)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            slots = permute(places[chosen], self.blocks_per_epoch, self.seed, 0, epoch)
            blocks[chosen] = self._blocks_of_slots(slots, epoch)
        return blocks

    def _blocks_of_slots(self, slots: Ids, epoch: int) -> Ids:
        """Slots of an epoch, ordered by source, to block ids."""
        blocks = np.empty_like(slots)
        first = 0
        for source, taken in enumerate(self._taken):
            chosen = (slots >= first) & (slots < first + taken)
            walk = epoch * taken + slots[chosen] - first
            blocks[chosen] = self._starts[source] + self._walk(source, walk)
            first += taken
        return blocks

    def _walk(self, source: int, walk: Ids) -> Ids:
        """Positions on the endless walk through a source to its own block numbers."""
        num_blocks = self._num_blocks[source]
        passes, places = np.divmod(walk, num_blocks)
        blocks = np.empty_like(walk)
        for number in np.unique(passes).tolist():
            chosen = passes == number
            blocks[chosen] = permute(places[chosen], num_blocks, self.seed, 1 + source, number)
        return blocks


def count_blocks(
    stream: TokenStream, context_length: int, dataset: TokenDataset, split: str
) -> int:
    """Whole blocks of a stream; raises ``DataError`` with the sizes if there is none."""
    blocks = (stream.num_tokens - 1) // context_length
    if blocks < 1:
        raise DataError(
            f"{dataset.path}: source '{stream.source}' has {stream.num_tokens:,} tokens in split "
            f"'{split}'; one block of context_length={context_length} needs {context_length + 1:,}"
        )
    return blocks

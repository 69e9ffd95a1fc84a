"""Pre-merge: a structured layer that keeps its dense weight beside its factors, for inference.

M = ``structured.to_dense()`` takes one matmul where the factors take two or more, and holds more
bytes. Which of the two is faster depends on the number of tokens, and a ``MergePolicy`` says it.

Letters: I = in_features, O = out_features, N = tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from factorlm.config import check
from factorlm.layers.base import StructuredLinear
from factorlm.layers.copies import Kept, KeptCopy, watchable_tensors
from factorlm.layers.wrapper import StructuredWrapper
from factorlm.ops.packed import can_pack, linear_packed, pack, takes_packed


@final
@dataclass(frozen=True, kw_only=True)
class MergePolicy:
    """For one layer: the token counts of a call at which its merged copy is used.

    Between two counts that are listed the nearest one decides, by ratio; beyond the last, the last.
    """

    token_counts: tuple[int, ...]
    """Ascending, from 1."""
    merged: tuple[bool, ...]
    """Whether each of them takes the merged copy."""

    def __post_init__(self) -> None:
        counts, merged = self.token_counts, self.merged
        same = len(counts) == len(merged)
        check(same, f"merged has {len(merged)} entries, token_counts {len(counts)}")
        ascending = all(a < b for a, b in zip((0, *counts), counts, strict=False))
        check(ascending, f"token_counts={counts} must ascend, from 1 or more")

    @classmethod
    def always(cls) -> Self:
        """Merged at any number of tokens."""
        return cls(token_counts=(1,), merged=(True,))

    @classmethod
    def never(cls) -> Self:
        """By its factors at any number of tokens: there is never a merged copy."""
        return cls(token_counts=(), merged=())

    @property
    def ever_merges(self) -> bool:
        """Whether there is a number of tokens that takes the merged copy."""
        return any(self.merged)

    def merges(self, num_tokens: int) -> bool:
        """Whether a call with ``num_tokens`` takes the merged copy; one without tokens does not."""
        counts = self.token_counts
        if num_tokens < 1 or not self.ever_merges:
            return False
        above = bisect_left(counts, num_tokens)
        if above == len(counts):
            return self.merged[-1]
        nearer_below = above > 0 and num_tokens**2 <= counts[above - 1] * counts[above]
        return self.merged[above - 1 if nearer_below else above]

    def __str__(self) -> str:
        counts = zip(self.token_counts, self.merged, strict=True)
        return ", ".join(str(count) for count, merged in counts if merged) or "none"


@final
class PreMergedLinear(StructuredWrapper):
    """``structured`` with a merged copy M of its map, (O, I), used where ``policy`` says so.

    On a CPU with oneDNN the copy is packed (``factorlm.ops.packed``), and where M is not used, so
    is a copy of factors that are whole matrices.

    Only a call in eval mode without gradients (``torch.no_grad``, ``torch.inference_mode``) takes
    a copy. Training, gradients, autocast, ``torch.compile``, a layer with hooks or with tensors
    that are no plain parameters take ``structured``, which is always right. So does a CUDA graph,
    unless ``factorlm.inference.capture`` captures it, which holds the copy and sees it go. Where
    copies are packed, so does what ``factorlm.ops.packed.takes_packed`` refuses.

    A copy is made by the first call that wants it. It is in no state dict and no list of
    parameters, and no copy of the module has it. It is dropped by ``train()``,
    ``load_state_dict``, moves to another device or dtype, any change of a factor that
    PyTorch counts, and a step of any optimizer of the process. A write that PyTorch does not count
    (through ``.data``, NumPy or DLPack) while the layer is in eval mode needs ``invalidate``.

    Several threads may call one layer. On an accelerator the copy is complete before another
    stream can see it.
    """

    policy: MergePolicy

    def __init__(self, structured: StructuredLinear, policy: MergePolicy) -> None:
        super().__init__(structured)
        self.policy = policy
        self._start()
        self.register_load_state_dict_post_hook(_after_load)
        self.train(structured.training)

    def _start(self) -> None:
        """What no copy of the module shares with it."""
        self._merged = KeptCopy()
        self._packed = KeptCopy()

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        structured = self.structured
        # Of the three, compilation comes first: nothing after it can be traced.
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return structured(x)
        casts = torch.is_autocast_enabled(x.device.type)  # all of a copy, in every call
        kept = None if casts else self._kept(x)
        if kept is None or (kept[0].is_mkldnn and not takes_packed(x, kept[0], structured.bias)):
            return structured(x)
        *first, last = kept
        for matrix in first:
            x = linear_packed(x, matrix)
        return linear_packed(x, last, structured.bias)

    def invalidate(self) -> None:
        """Drop all copies; the next call that wants one computes it anew."""
        self._merged.drop()
        self._packed.drop()

    @property
    def has_copy(self) -> bool:
        """Whether memory is held for a merged copy now."""
        return self._merged.exists

    @property
    def in_features(self) -> int:
        """I."""
        return self.structured.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.structured.out_features

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same weight, bias, device, dtype and mode."""
        return self.structured.to_linear()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training drops the copies."""
        if mode:
            self.invalidate()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Where it is merged."""
        return f"merged at tokens: {self.policy}"

    def _kept(self, x: Tensor) -> Kept | None:
        """The matrices to multiply ``x`` by, one after the other; None: the structured layer."""
        structured = self.structured
        merges = self.policy.merges(x.numel() // structured.in_features)
        matrices = structured.matrices()
        packs = bool(matrices) and all(map(can_pack, matrices))
        tensors = watchable_tensors(structured) if merges or packs else None
        if tensors is None or x.dtype != tensors[0].dtype:
            return None
        if merges and _is_captured(x):
            return self._merged.hold(structured)
        if merges:
            return self._merged.get(tensors, self._merge)
        return self._packed.get(tensors, lambda: tuple(map(pack, structured.matrices())))

    def _merge(self) -> Kept:
        dense = self.structured.weight.contiguous()
        return (pack(dense) if can_pack(dense) else dense,)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.invalidate()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_merged", "_packed")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


def _is_captured(x: Tensor) -> bool:
    """Whether work on ``x`` goes into a CUDA graph, which may be replayed when M is gone."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _after_load(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, PreMergedLinear)
    module.invalidate()

"""Pre-merge: a structured layer that keeps its dense weight beside its factors, for inference.

M = ``structured.to_dense()`` takes one matmul where the factors take two or more, and holds more
bytes. Which of the two is faster depends on the number of tokens, and a ``MergePolicy`` says it.

Letters: I = in_features, O = out_features, N = tokens.
"""

from __future__ import annotations

import functools
import threading
import weakref
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook

from factorlm.config import check
from factorlm.layers.base import StructuredLinear
from factorlm.layers.wrapper import StructuredWrapper


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
        """Structured at any number of tokens: there is never a copy."""
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

    Only a call in eval mode without gradients (``torch.no_grad``, ``torch.inference_mode``) takes
    M. Training, gradients, autocast, ``torch.compile``, the capture of a CUDA graph, and a layer
    with hooks or with tensors that are no plain parameters take ``structured``, which is always
    right.

    M is computed by the first call that wants it. It is in no state dict and no list of
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
        self._copy: _Copy | None = None
        self._epoch = object()
        self._building = threading.Lock()
        _watch(self)

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        structured = self.structured
        # Of the three, compilation comes first: nothing after it can be traced.
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return structured(x)
        if self.policy.merges(x.numel() // structured.in_features):
            casts = torch.is_autocast_enabled(x.device.type)  # all of M, in every call
            dense = None if casts or _is_captured(x) else self._merged()
            if dense is not None:
                return linear(x, dense, structured.bias)
        return structured(x)

    def invalidate(self) -> None:
        """Drop the merged copy; the next call that wants it computes it anew."""
        # A new epoch, since another thread may be computing a copy of the factors as they were.
        self._epoch = object()
        self._copy = None

    @property
    def has_copy(self) -> bool:
        """Whether memory is held for a merged copy now."""
        return self._copy is not None

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
        """Set the mode; training drops the merged copy."""
        if mode:
            self.invalidate()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Where it is merged."""
        return f"merged at tokens: {self.policy}"

    def _merged(self) -> Tensor | None:
        """M of the factors as they are; None where their changes could not be seen."""
        tensors = _watchable_tensors(self.structured)
        if tensors is None:
            return None
        copy = self._copy
        if copy is None or not copy.is_of(tensors, self._epoch):
            del copy  # or the old M would live until the new one is there
            with self._building:
                copy = self._copy
                if copy is None or not copy.is_of(tensors, self._epoch):
                    self._copy = copy = None
                    self._copy = copy = _make_copy(self.structured, tensors, self._epoch)
        return copy.dense

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.invalidate()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_copy", "_epoch", "_building")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


class _Source(NamedTuple):
    """A tensor that M was computed from, as it was."""

    tensor: Tensor
    version: int
    storage: torch.UntypedStorage
    """Held, so that no other tensor can get its address."""
    address: int


class _Copy(NamedTuple):
    """M and what it was computed from; never changed, so that threads see all of it or nothing."""

    dense: Tensor
    sources: tuple[_Source, ...]
    epoch: object

    def is_of(self, tensors: tuple[Tensor, ...], epoch: object) -> bool:
        """Whether M is the map of ``tensors`` as they are."""
        if self.epoch is not epoch or len(tensors) != len(self.sources):
            return False
        return all(
            tensor is source.tensor
            and tensor._version == source.version
            and tensor.data_ptr() == source.address
            for tensor, source in zip(tensors, self.sources, strict=True)
        )


def _watchable_tensors(layer: StructuredLinear) -> tuple[Tensor, ...] | None:
    """The tensors of ``layer``; None where they may change unseen, or where its ``forward`` is not
    all that a call does: sharded or wrapped tensors, those of inference mode, parametrisations,
    hooks, and what accelerate puts in the place of ``forward``."""
    if layer._modules or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if "forward" in layer.__dict__:
        return None
    parameters = [tensor for tensor in layer._parameters.values() if tensor is not None]
    buffers = [tensor for tensor in layer._buffers.values() if tensor is not None]
    # What `functional_call` lends to a layer is no parameter.
    plain = all(type(tensor) is nn.Parameter for tensor in parameters)
    plain = plain and all(type(tensor) is Tensor for tensor in buffers)
    tensors = (*parameters, *buffers)
    return tensors if plain and not any(tensor.is_inference() for tensor in tensors) else None


def _is_captured(x: Tensor) -> bool:
    """Whether work on ``x`` goes into a CUDA graph, which is replayed when M may be gone."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _make_copy(layer: StructuredLinear, tensors: tuple[Tensor, ...], epoch: object) -> _Copy:
    # Noted before M is computed: a change meanwhile must not go unseen.
    sources = tuple(
        _Source(tensor, tensor._version, tensor.untyped_storage(), tensor.data_ptr())
        for tensor in tensors
    )
    dense = layer.weight.contiguous()
    if dense.device.type not in ("cpu", "meta"):
        torch.accelerator.current_stream(dense.device).synchronize()
    return _Copy(dense, sources, epoch)


def _after_load(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, PreMergedLinear)
    module.invalidate()


def _watch(layer: PreMergedLinear) -> None:
    """Drop the copy of ``layer`` after a step of any optimizer, for as long as it lives."""
    with _LAYERS_LOCK:
        _watch_optimizers()
        _LAYERS.add(layer)


@functools.cache
def _watch_optimizers() -> None:
    """From the first layer on. The global hook sees fused optimizers too, which may write without
    a change of version."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(*step: object) -> None:
    with _LAYERS_LOCK:
        layers = list(_LAYERS)
    for layer in layers:
        layer.invalidate()


_LAYERS: weakref.WeakSet[PreMergedLinear] = weakref.WeakSet()
_LAYERS_LOCK = threading.Lock()

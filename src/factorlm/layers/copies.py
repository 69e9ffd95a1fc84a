"""What is computed from a layer's weights once and kept beside them for inference.

A kept copy is never wrong: it is dropped as soon as the weights may be others.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Kept = tuple[Tensor, ...]


class KeptCopy:
    """Tensors computed from those of a layer, for as long as these stay what they were.

    Several threads may ask for them. On an accelerator they are complete
    before another stream can see them. Any step of any optimizer of the process drops them.
    """

    def __init__(self) -> None:
        self._copy: _Copy | None = None
        self._epoch = object()
        self._building = threading.Lock()
        _watch(self)

    @property
    def exists(self) -> bool:
        """Whether memory is held for it now."""
        return self._copy is not None

    def drop(self) -> None:
        """Forget it; the next call that wants it computes it anew."""
        # A new epoch, since another thread may be computing a copy of the weights as they were.
        self._epoch = object()
        self._copy = None

    def get(self, tensors: tuple[Tensor, ...], make: Callable[[], Kept]) -> Kept:
        """It, computed by ``make`` from ``tensors`` as they are."""
        copy = self._copy
        if copy is None or not copy.is_of(tensors, self._epoch):
            del copy  # or the old one would live until the new one is there
            with self._building:
                copy = self._copy
                if copy is None or not copy.is_of(tensors, self._epoch):
                    self._copy = copy = None
                    self._copy = copy = self._new(tensors, make)
        return copy.kept

    def hold(self, layer: nn.Module) -> Kept | None:
        """It, that of ``layer``, for the CUDA graph that is captured now.

        None outside of ``holding_copies``, which keeps it alive, and where it would have to be
        computed, which a graph would do anew in every replay.
        """
        holder, copy = _HOLDER.get(), self._copy
        if holder is None or copy is None:
            return None
        held = _Held(layer, self, copy)
        return holder.take(held) if held.is_current() else None

    def _new(self, tensors: tuple[Tensor, ...], make: Callable[[], Kept]) -> _Copy:
        # Noted before anything is computed: a change meanwhile must not go unseen.
        epoch = self._epoch
        sources = tuple(map(_Source.of, tensors))
        kept = make()
        device = tensors[0].device
        if device.type not in ("cpu", "meta"):
            torch.accelerator.current_stream(device).synchronize()
        return _Copy(kept, sources, epoch)


class _Source(NamedTuple):
    """A tensor that a copy was computed from, as it was."""

    tensor: Tensor
    version: int
    storage: torch.UntypedStorage
    """Held, so that no other tensor can get its address."""
    address: int
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """``tensor`` as it is."""
        return cls(
            tensor=tensor,
            version=tensor._version,
            storage=tensor.untyped_storage(),
            address=tensor.data_ptr(),
            shape=tensor.shape,
            strides=tensor.stride(),
        )

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the one it was, unchanged."""
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
            and tensor.shape == self.shape
            and tensor.stride() == self.strides
        )


class _Copy(NamedTuple):
    """What is kept and what it was computed from; never changed, so that threads see all of it or
    nothing."""

    kept: Kept
    sources: tuple[_Source, ...]
    epoch: object

    def is_of(self, tensors: tuple[Tensor, ...], epoch: object) -> bool:
        """Whether it is that of ``tensors`` as they are."""
        if self.epoch is not epoch or len(tensors) != len(self.sources):
            return False
        return all(map(_Source.is_still, self.sources, tensors))


class _Held(NamedTuple):
    """A copy that someone reads without asking its place for it."""

    layer: nn.Module
    place: KeptCopy
    copy: _Copy

    def is_kept(self) -> bool:
        """Whether it has its place still."""
        return self.place._copy is self.copy

    def is_current(self) -> bool:
        """Whether a call of the layer would take it now."""
        tensors = watchable_tensors(self.layer)
        if tensors is None or not self.is_kept():
            return False
        return self.copy.is_of(tensors, self.place._epoch)


class HeldCopies:
    """The copies that a CUDA graph reads where they lie. They live as long as this does."""

    def __init__(self) -> None:
        self._all: list[_Held] = []

    def take(self, held: _Held) -> Kept:
        """Hold one more."""
        self._all.append(held)
        return held.copy.kept

    def are_kept(self) -> bool:
        """Whether no layer dropped its copy or made another. It looks at no weight: a change in
        place that no call has met yet is not seen."""
        return all(held.is_kept() for held in self._all)

    def are_current(self) -> bool:
        """Whether the layers would take these copies in a call now."""
        return all(held.is_current() for held in self._all)


@contextmanager
def holding_copies() -> Iterator[HeldCopies]:
    """Within it, and in this thread, what is captured as a CUDA graph may read copies. Whoever
    replays the graph keeps what this gives, and asks it first."""
    copies = HeldCopies()
    token = _HOLDER.set(copies)
    try:
        yield copies
    finally:
        _HOLDER.reset(token)


def watchable_tensors(layer: nn.Module) -> tuple[Tensor, ...] | None:
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


def _watch(copy: KeptCopy) -> None:
    """Drop ``copy`` after a step of any optimizer, for as long as it lives."""
    with _COPIES_LOCK:
        _watch_optimizers()
        _COPIES.add(copy)


@functools.cache
def _watch_optimizers() -> None:
    """From the first copy on. The global hook sees fused optimizers too, which may write without
    a change of version."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(*step: object) -> None:
    with _COPIES_LOCK:
        copies = list(_COPIES)
    for copy in copies:
        copy.drop()


_HOLDER: ContextVar[HeldCopies | None] = ContextVar("_HOLDER", default=None)
_COPIES: weakref.WeakSet[KeptCopy] = weakref.WeakSet()
_COPIES_LOCK = threading.Lock()

"""Decoding from a graph: of CUDA, one launch a token; on a CPU compiled, without Python's part.

A graph works on fixed memory, so the cache and its mask have their full length and the place of the
next token is a number on the device. Hugging Face's ``StaticLayer`` is made for this.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from factorlm.inference.capture import NUM_WARM_UPS, capture
from factorlm.inference.steps import LastLogits, Steps

_COMPILING = threading.Lock()
"""Held while a step is compiled, so that what was generated then belongs to it."""


class GraphSteps(Steps):
    """Prompts are computed as usual; every later token replays one graph.

    The graph is made once, for ``batch`` rows of ``max_length`` tokens. A CUDA graph reads weights,
    and merged copies where ``premerge_`` chose them for ``batch`` tokens, where they lie:
    ``is_current`` says whether a new one is needed. A ``compiled`` one holds packed weights of its
    own: any change of a weight needs a new one, which nobody says.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, max_length: int, *, compiled: bool = False
    ) -> None:
        self.max_length = max_length
        self._model = model
        self._places = places(model)
        device = model.device
        self._logits = LastLogits(model)
        self._cache = fixed_cache(model.config, max_length)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        # Ones beyond the tokens so far are hidden by causality.
        self._mask = torch.ones(batch, max_length, dtype=torch.long, device=device)
        self._captured = None if compiled else capture(self._without_self(), device)
        self._replay = self._captured or compile_frozen(self)
        self._has_to_compile = compiled

    def prefill(self, ids: Tensor, num_pads: Tensor | None) -> Tensor:
        """See ``Steps``."""
        if self._has_to_compile:  # the first call may run the step twice
            self._prefill(ids[:, :1], None)
            with _weights_go_with(self):
                self._replay()
            self._has_to_compile = False
        return self._prefill(ids, num_pads)

    def _prefill(self, ids: Tensor, num_pads: Tensor | None) -> Tensor:
        length = ids.shape[1]
        pads = ids.new_zeros(len(ids)) if num_pads is None else num_pads
        columns = torch.arange(self.max_length, device=ids.device)
        self._mask.copy_(columns >= pads.unsqueeze(1))
        self._position.copy_((length - pads).unsqueeze(1))
        self._cache.reset()
        positions = (columns[:length] - pads.unsqueeze(1)).clamp(min=0)
        mask = None if num_pads is None else self._mask[:, :length]
        return self._logits(ids, mask, positions, self._cache)

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Steps``."""
        self._token.copy_(tokens.unsqueeze(1))
        if self._captured is not None and not self._captured.is_kept():
            return self._step()  # until a generation that asks ``is_current``
        return self._replay()

    def is_current(self) -> bool:
        """See ``Steps``. Not of a ``compiled`` one."""
        if self._captured is None:
            return True
        return self._captured.is_current() and places(self._model) == self._places

    def _step(self) -> Tensor:
        """What is captured: reads and writes only memory that stays where it is."""
        return _decode(self._logits, self._token, self._mask, self._position, self._cache)

    def _without_self(self) -> Callable[[], Tensor]:
        """``_step``, that a graph can hold without holding this, which holds the graph."""
        return partial(_decode, self._logits, self._token, self._mask, self._position, self._cache)


def _decode(
    logits: LastLogits, token: Tensor, mask: Tensor, position: Tensor, cache: Cache
) -> Tensor:
    found = logits(token, mask, position, cache)
    position.add_(1)
    return found


def places(model: PreTrainedModel) -> list[tuple[object, ...]]:
    """Where the weights and buffers lie, and how."""
    return [
        (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for tensor in chain(model.parameters(), model.buffers())
    ]


def fixed_cache(config: PretrainedConfig, max_length: int) -> Cache:
    """An empty cache of ``max_length`` tokens a row, which keeps every number on the device.

    Not ``StaticCache``: its layers with a sliding window count tokens in Python, where a graph sees
    one number for ever. A window that stays open (``is_steady``) needs no such layer.
    """
    return Cache(layers=[StaticLayer(max_length) for _ in DynamicCache(config=config).layers])


def compile_frozen(steps: GraphSteps) -> Callable[[], Tensor]:
    """The step as one program, which its first call compiles; weights are constants of it, in the
    order that is read fastest. Nothing is checked later: whoever changes what it reads makes a new
    one."""
    from torch._inductor import config

    # Programs are kept by code object: with its own, no other object's program is found.
    step = GraphSteps._step
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    program = torch.compile(
        MethodType(own, steps),
        dynamic=False,
        fullgraph=True,
        options={"guard_filter_fn": lambda guards: [False] * len(guards)},
    )

    def run() -> Tensor:
        # As options of torch.compile they have no effect, and a later call may compile again.
        with config.patch(freezing=True, cpp_wrapper=True):
            return program()

    return run


@contextmanager
def _weights_go_with(steps: GraphSteps) -> Iterator[None]:
    """What is compiled within loses its packed weights when ``steps`` is collected: PyTorch keeps
    every module that it generates, to the end of the process, and they are constants of one."""
    from torch._inductor.codecache import PyCodeCache

    with _COMPILING:
        known = len(PyCodeCache.modules)
        yield
        made = PyCodeCache.modules[known:]
    weakref.finalize(steps, _drop_weights, made).atexit = False


def _drop_weights(modules: list[ModuleType]) -> None:
    for module in modules:
        for name in [name for name in vars(module) if name.startswith("_frozen_param")]:
            delattr(module, name)


def can_compile(model: PreTrainedModel, max_length: int) -> bool:
    """Whether one compiled program serves every token of ``model``, up to ``max_length``: it is on
    the CPU, and otherwise as in ``can_capture``."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return on_cpu and model._can_compile_fullgraph and is_steady(model, max_length)


def can_capture(model: PreTrainedModel, max_length: int) -> bool:
    """Whether one graph serves every token of ``model``, up to ``max_length``.

    The model is on one GPU, Hugging Face marks it as fit for compilation (no look at values on
    the host), and every step is the same: see ``is_steady``.
    """
    devices = {parameter.device for parameter in model.parameters()}
    on_one_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
    return on_one_gpu and model._can_compile_fullgraph and is_steady(model, max_length)


def is_steady(model: PreTrainedModel, max_length: int) -> bool:
    """Whether ``model`` computes the same way at every length up to ``max_length``.

    Positions come from outside (ALiBi makes its own from the mask), rotary embeddings do not
    change with the length, and no sliding window closes.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        "position_ids" in inspect.signature(model.forward).parameters
        and not getattr(config, "alibi", False)
        and rope.get("rope_type") not in ("dynamic", "longrope")
        and max_length > NUM_WARM_UPS
        and all(_stays_open(layer, max_length) for layer in DynamicCache(config=config).layers)
    )


def _stays_open(layer: object, max_length: int) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= max_length
    return type(layer) is DynamicLayer

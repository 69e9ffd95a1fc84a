"""Self-guided training by the Hugging Face ``Trainer``: a callback that keeps the guides' time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from factorlm.config import check
from factorlm.layers.self_guided import GuideForm
from factorlm.optim.guidance import GuideKind, GuideSchedule, GuideVariant
from factorlm.surgery import (
    attach_guides_,
    detach_guides_,
    guided_layers,
    set_guides_,
    update_block,
)
from factorlm.surgery.block import GUIDED
from factorlm.surgery.guides import IGNORED_BY_DDP, hide_guides_from_ddp


@final
class SelfGuidedTraining(TrainerCallback, ExportableState):
    """Trains with a dense guide beside every structured layer for a part of the steps
    (arXiv 2407.09835, section 4)::

        Trainer(model=model, args=args, train_dataset=data, callbacks=[SelfGuidedTraining()])

    Guides are attached when the ``Trainer`` is made, so that its optimizer trains them, and are
    gone after ``num_steps`` or ``round(share * max_steps)`` optimizer steps, with their gradients
    and their optimizer state. From then on, everything that is saved is an ordinary structured
    model. Until then, the checkpoints hold the guides and are marked: they can be resumed, with
    this callback and the same schedule, and bit-equal to a run that was not cut, but not opened as
    models.

    This is the fixed-step mode. ``factorlm.hf.plan_for_budget`` solves the steps for a budget of
    FLOPs, replays the guided tokens, has the control at equal FLOPs, and makes this callback.

    If you make the optimizer yourself, call ``attach_guides_(model)`` first; ``form`` is then
    what that call says. The same goes for guides that a ``model_init`` attaches.

    Args:
        share: of ``max_steps``, in (0, 1]: how long there are guides; ½ where neither it nor
            ``num_steps`` is stated.
        num_steps: in the place of ``share``: how many optimizer steps there are guides.
        kind: ``GuideSchedule.kind``, how α goes from 1 to 0.
        variant: ``GuideSchedule.variant``; in a step that ``stochastic`` leaves out, guides are
            not updated, not decayed, and their optimizer state does not move.
        form: ``SelfGuidedLinear``'s, how a guided pass is computed.
        seed: of the choice of these steps, which is the same in all processes.

    It runs on one device, and on several under DDP. DDP ignores the guides, so that nothing of
    them stays in its buckets and a skipped step is not waited for; their gradients are averaged as
    they come, so every process has to run every guided layer in a step. Only the guides that a
    ``model_init`` attaches are left to DDP, which then needs ``ddp_find_unused_parameters`` and
    keeps memory of their size to the end.

    Raises ``ConfigError`` for values out of range, when the ``Trainer`` is made for DeepSpeed and,
    when training begins, for what else it cannot run with: ``load_best_model_at_end``, FSDP, DDP
    without that setting where it is needed, an optimizer that does not hold the guides, and a
    checkpoint of another schedule.
    """

    def __init__(
        self,
        share: float | None = None,
        *,
        num_steps: int | None = None,
        kind: GuideKind = "cosine",
        variant: GuideVariant = "full",
        form: GuideForm = "auto",
        seed: int = 0,
    ) -> None:
        check(share is None or num_steps is None, f"{share=} and {num_steps=}: state one of them")
        if share is None and num_steps is None:
            share = 0.5
        check(share is None or 0 < share <= 1, f"share={share} must lie in (0, 1]")
        check(form in get_args(GuideForm), f"form={form!r} must be one of {get_args(GuideForm)}")
        self.share = share
        self.form: GuideForm = form
        first = 1 if num_steps is None else num_steps
        self.schedule = GuideSchedule(num_steps=first, kind=kind, variant=variant, seed=seed)
        """With a ``share``, its ``num_steps`` is known once training begins."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint's ``trainer_state.json`` says of the callback."""
        schedule = self.schedule.to_dict()
        own = {key: schedule[key] for key in ("kind", "variant", "seed")}
        num_steps = schedule["num_steps"] if self.share is None else None
        arguments = {"share": self.share, "num_steps": num_steps, "form": self.form} | own
        return {"args": arguments, "attributes": {}, "schedule": schedule}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **others: object,
    ) -> None:
        """Attach the guides, where the user has not."""
        _check_engine(args)
        if not guided_layers(model):
            check(
                optimizer is None,
                "the optimizer was made before there were guides: call attach_guides_(model), and "
                "make the optimizer after that",
            )
            attach_guides_(model, form=self.form)
        hide_guides_from_ddp(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **others: object,
    ) -> None:
        """Settle the schedule, check what it needs, and start where the run is."""
        _check_arguments(args, model)
        self._settle(state.max_steps)
        if state.global_step > 0:
            _check_resumed(state, self)
        if state.global_step >= self.schedule.num_steps:
            _end(model, optimizer)
            return
        _check_attached(model, optimizer)
        _allow_saving(model)
        if args.parallel_mode == ParallelMode.DISTRIBUTED and _is_hidden(model):
            _replicate(model, optimizer)
        self._start_step(model, state.global_step)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        *,
        model: nn.Module,
        **others: object,
    ) -> None:
        """Set α and whether the guides run, once for all batches of an optimizer step."""
        self._start_step(model, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **others: object,
    ) -> None:
        """Take the guides off after their last step, before that step's evaluation and save."""
        if state.global_step >= self.schedule.num_steps:
            _end(model, optimizer)

    def _settle(self, max_steps: int) -> None:
        """How many steps have guides, of ``max_steps``."""
        if self.share is not None:
            num_steps = round(self.share * max_steps)
            check(num_steps >= 1, f"share={self.share} of max_steps={max_steps} is not one step")
            self.schedule = self.schedule.replace(num_steps=num_steps)
        num_steps = self.schedule.num_steps
        check(num_steps <= max_steps, f"num_steps={num_steps} must be at most {max_steps=}")

    def _start_step(self, model: nn.Module, step: int) -> None:
        set_guides_(guided_layers(model).values(), self.schedule, step)


def _end(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take the guides off; their weights stay in the optimizer's groups, empty.

    So the sizes of the groups, which an optimizer's file has to fit when a run is resumed, are the
    same with and without guides.
    """
    for weight in detach_guides_(model):
        optimizer.state.pop(weight, None)
        weight.grad = None
        weight.data = weight.data.new_empty(0)


def _is_hidden(model: nn.Module) -> bool:
    """Whether ``hide_guides_from_ddp`` saw this model; it cannot see what ``train`` makes anew."""
    return IGNORED_BY_DDP in vars(model)


def _replicate(model: nn.Module, optimizer: Any) -> None:
    """Do for the guides what DDP does for other weights: equal at first, gradients averaged.

    ``optimizer`` is accelerate's, whose ``gradient_state`` says which batch ends a step.
    """
    for layer in guided_layers(model).values():
        weight = layer.guide.weight
        dist.broadcast(weight.detach(), 0)
        weight.register_post_accumulate_grad_hook(partial(_average, optimizer.gradient_state))


def _average(gradient_state: Any, weight: Tensor) -> None:
    """In the backward pass, and so before the ``Trainer`` clips."""
    if gradient_state.sync_gradients:
        assert weight.grad is not None
        weight.grad /= dist.get_world_size()
        dist.all_reduce(weight.grad)


def _check_engine(args: TrainingArguments) -> None:
    check(
        args.deepspeed_plugin is None,
        "SelfGuidedTraining does not run under DeepSpeed: use DDP, or `factorlm train`",
    )


def _check_arguments(args: TrainingArguments, model: nn.Module) -> None:
    _check_engine(args)
    check(
        not args.load_best_model_at_end,
        "load_best_model_at_end=True might load a checkpoint from while there were guides: open "
        "the checkpoint that you choose with factorlm.load",
    )
    check(
        not isinstance(model, FSDPModule | FullyShardedDataParallel),
        "SelfGuidedTraining does not run under the Trainer's FSDP: use DDP, or `factorlm train`",
    )
    if args.parallel_mode != ParallelMode.DISTRIBUTED or _is_hidden(model):
        return
    finds = args.ddp_find_unused_parameters
    if finds is None:
        finds = not args.gradient_checkpointing
    check(
        finds and not args.ddp_static_graph,
        "ddp_find_unused_parameters must be True and ddp_static_graph must not, where a model_init "
        "attaches the guides: a step without them gives them no gradient",
    )


def _check_resumed(state: TrainerState, callback: SelfGuidedTraining) -> None:
    """Raise ``ConfigError`` unless the resumed checkpoint comes from a run on its schedule."""
    name, has_share = type(callback).__name__, callback.share is not None
    saved = state.stateful_callbacks.get(name)
    check(isinstance(saved, Mapping), f"the checkpoint is not of one run with {name}")
    for field, value in callback.schedule.to_dict().items():
        old = saved["schedule"][field]
        hint = " (share x max_steps)" if field == "num_steps" and has_share else ""
        check(
            old == value,
            f"{field}={value!r}{hint} of {name} differs from the checkpoint's {field}={old!r}",
        )


def _check_attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ConfigError`` unless there are guides and ``optimizer`` trains them all."""
    layers = guided_layers(model)
    check(
        bool(layers),
        "the model has no guides: give SelfGuidedTraining to a new Trainer(callbacks=[...]); a "
        "model_init has to call attach_guides_ itself",
    )
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for name, layer in layers.items():
        check(
            id(layer.guide.weight) in held,
            f"{name}.guide.weight is in no group of the optimizer: make it after attach_guides_",
        )


def _allow_saving(model: nn.Module) -> None:
    """Put ``_save_guided`` in the place of the ``save_pretrained`` that refuses."""
    if isinstance(model, PreTrainedModel):
        model.__dict__["save_pretrained"] = partial(_save_guided, model)


def _save_guided(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """``save_pretrained`` with the guides, into a folder that says that it has them."""
    update_block(model)
    block = model.config.quantization_config
    model.config.quantization_config = block | {GUIDED: True}
    try:
        type(model).save_pretrained(model, *args, **kwargs)
    finally:
        model.config.quantization_config = block

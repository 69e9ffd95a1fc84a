"""``SelfGuidedTraining`` in the Hugging Face ``Trainer`` under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from factorlm.errors import ConfigError
from factorlm.hf import SelfGuidedTraining, build_causal_lm, load
from factorlm.layers import LowRankConfig
from factorlm.surgery import attach_guides_, guided_layers
from factorlm.testing.distributed import run_distributed
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids

NUM_STEPS, NUM_GUIDED, SKIPPED = 6, 4, [1, 3]
SEED = 5
"""Of the skipped steps."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_search": {"ddp_find_unused_parameters": False},
    "static_graph": {"ddp_find_unused_parameters": False, "ddp_static_graph": True},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}
"""Arguments of the ``Trainer`` in each of two processes; one process takes batches of four."""


def build(seed: int = 0) -> PreTrainedModel:
    """Without dropout, so that one process can do the same."""
    return build_causal_lm(TINY_CONFIGS["llama"](), LowRankConfig(rank=4), seed=seed)


def guided(model: PreTrainedModel) -> PreTrainedModel:
    attach_guides_(model)
    return model


class Probe(TrainerCallback):
    """Notes which steps move the guides, and the norm of their gradients in each."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}
        self.moved: list[int] = []

    def on_step_begin(self, args, state, control, model, **others) -> None:
        self.before = _guides(model)

    def on_pre_optimizer_step(self, args, state, control, model, **others) -> None:
        weights = [layer.guide.weight for layer in guided_layers(model).values()]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if grads:
            self.norms[state.global_step] = float(nn.utils.get_total_norm(grads))

    def on_optimizer_step(self, args, state, control, model, **others) -> None:
        pairs = zip(self.before, _guides(model), strict=True)
        if any(not torch.equal(*pair) for pair in pairs):
            self.moved.append(state.global_step)


def _guides(model: nn.Module) -> list[Tensor]:
    return [layer.guide.weight.detach().clone() for layer in guided_layers(model).values()]


def make_trainer(folder: str | Path, *callbacks: TrainerCallback, **fields: Any) -> Trainer:
    """``model`` and ``model_init`` go to the ``Trainer``, other fields to its arguments."""
    made = {key: fields.pop(key) for key in ("model", "model_init") if key in fields}
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_steps": NUM_STEPS,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny_input_ids(batch=24)]
    return Trainer(
        **made,
        args=TrainingArguments(**(arguments | fields)),
        train_dataset=rows,
        callbacks=list(callbacks),
    )


def guidance() -> SelfGuidedTraining:
    return SelfGuidedTraining(share=NUM_GUIDED / NUM_STEPS, variant="stochastic", seed=SEED)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


Replica = tuple[dict[str, Tensor], list[int], dict[int, float], bool]


def _train_replica(folder: str, fields: dict[str, Any]) -> Replica:
    """The processes begin with other weights: DDP takes those of rank 0, and so do guides."""
    probe, model = Probe(), build(dist.get_rank())
    trainer = make_trainer(folder, guidance(), probe, model=model, **fields)
    trainer.train()
    return weights(model), probe.moved, probe.norms, _holds_only(trainer.model_wrapped, model)


def _train_replicas(folder: str) -> tuple[dict[str, Replica], tuple[str, str, dict[str, Tensor]]]:
    """Everything in one pair of processes, which take long to start."""
    cases = {case: _train_replica(f"{folder}/{case}", fields) for case, fields in CASES.items()}
    return cases, _train_model_init(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return run_distributed(_train_replicas, 2, str(folder), timeout_s=300.0)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Probe, dict[str, Tensor]]:
    """One process."""
    probe, model, folder = Probe(), build(), tmp_path_factory.mktemp("one")
    make_trainer(folder, guidance(), probe, model=model, per_device_train_batch_size=4).train()
    return probe, weights(model)


def _holds_only(replica: nn.Module, model: nn.Module) -> bool:
    """Whether DDP's buckets and buffers have room for the parameters of ``model`` and no more."""
    assert isinstance(replica, DistributedDataParallel)
    data = replica._get_ddp_logging_data()
    sizes = str(data.get("rebuilt_bucket_sizes") or data["bucket_sizes"])
    held = sum(int(size) for size in sizes.split(","))
    wanted = sum(parameter.nbytes for parameter in model.parameters())
    return held == wanted and len(replica.modules_buffers) == len(list(model.buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does_and_pay_nothing_after(
    case: str, single: Any, ranks: Any
) -> None:
    probe, wanted = single
    first = ranks[0][0][case][0]
    for cases, _ in ranks:
        found, moved, norms, holds_only = cases[case]
        assert holds_only
        assert moved == probe.moved == [s for s in range(NUM_GUIDED) if s not in SKIPPED]
        assert norms == pytest.approx(probe.norms, rel=1e-3)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], first[name]), name
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_from_after_guidance_is_an_ordinary_model(ranks: Any, folder: Path) -> None:
    saved = weights(load(folder / "plain" / f"checkpoint-{NUM_STEPS}"))
    found = ranks[0][0]["plain"][0]
    assert saved.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in saved.items())


def _train_model_init(folder: str) -> tuple[str, str, dict[str, Tensor]]:
    """Guides that DDP holds: what is said without its search, and under FSDP; then a whole run."""
    options: dict[str, Any] = {"model_init": lambda: guided(build())}
    blind = make_trainer(folder, guidance(), **options, ddp_find_unused_parameters=False)
    with pytest.raises(ConfigError) as unsearched:
        blind.train()
    model = fully_shard(guided(build()), mesh=init_device_mesh("cpu", (2,)))
    arguments = (blind.args, blind.state, blind.control)
    with pytest.raises(ConfigError) as sharded:
        guidance().on_train_begin(*arguments, model=model, optimizer=blind.optimizer)
    trainer = make_trainer(folder, guidance(), **options)
    trainer.train()
    return str(unsearched.value), str(sharded.value), weights(trainer.model)


@pytest.mark.slow
def test_guides_of_a_model_init_are_left_to_ddp(single: Any, ranks: Any) -> None:
    for _, (unsearched, sharded, found) in ranks:
        assert "ddp_find_unused_parameters must be True" in unsearched
        assert "does not run under the Trainer's FSDP" in sharded
        for name, tensor in single[1].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)

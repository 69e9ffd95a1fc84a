"""Self-guided training on a budget of FLOPs in the Hugging Face ``Trainer``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from factorlm.accounting import training_flops
from factorlm.errors import ConfigError
from factorlm.hf import SelfGuidedTraining, TrainerPlan, build_causal_lm, plan_for_budget
from factorlm.layers import LowRankConfig
from factorlm.surgery import attach_guides_, guided_layers
from factorlm.testing.distributed import run_distributed
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids
from factorlm.train.assemble import build_model
from factorlm.train.describe import plan_steps
from factorlm.train.recipe import load_recipe

PAPERS = Path(__file__).parents[2] / "recipes" / "papers"
NUM_ORIGINAL, NUM_GUIDED, NUM_STEPS, NUM_CONTROL = 10, 4, 14, 14
"""Of ``make_plan``, by hand: in MFLOPs a structured step costs 6.75 and a dense one 10.07, a guide
adds 3.93; 10 x (10.07 - 6.75) / (6.75 + 3.93 / 2) = 3.8, and 10 x 10.07 / 6.75 = 14.9."""
ROWS, LENGTH = 4, 10
SIZES = {"num_original_steps": NUM_ORIGINAL, "rows_per_step": ROWS, "seq_len": LENGTH}


def build(*, seed: int = 0, dense: bool = False) -> PreTrainedModel:
    """GPT-2 has dropout, so that a resumed run needs its RNG back."""
    structure = None if dense else LowRankConfig(rank=4)
    return build_causal_lm(TINY_CONFIGS["gpt2"](), structure, seed=seed)


def make_plan(**fields: Any) -> TrainerPlan:
    return plan_for_budget(build(), **(SIZES | {"variant": "stochastic", "seed": 4} | fields))


def make_data(num_rows: int = 24) -> list[dict[str, Tensor]]:
    """Rows that begin with their number; six steps an epoch."""
    ids = tiny_input_ids(batch=num_rows, length=LENGTH)
    ids[:, 0] = torch.arange(num_rows)
    return [{"input_ids": row, "labels": row} for row in ids]


class Reads(TrainerCallback):
    """Notes which rows the model is given in every step, and whether it has guides then."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = defaultdict(list)
        self.guided: list[int] = []

    def on_train_begin(self, args, state, control, model, **others) -> None:
        self.step = state.global_step
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def on_step_begin(self, args, state, control, model, **others) -> None:
        self.step = state.global_step
        if guided_layers(model):
            self.guided.append(self.step)

    def _note(self, model: Any, args: Any, kwargs: Any) -> None:
        self.rows[self.step] += kwargs["input_ids"][:, 0].tolist()

    @property
    def flat(self) -> list[int]:
        return [row for step in sorted(self.rows) for row in self.rows[step]]


def make_trainer(
    folder: Path | str,
    data: Any,
    *callbacks: TrainerCallback,
    model: PreTrainedModel | None = None,
    **fields: Any,
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": ROWS,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        model=model or build(),
        args=TrainingArguments(**(arguments | fields)),
        train_dataset=data,
        callbacks=list(callbacks),
    )


def planned(folder: Path | str, plan: TrainerPlan, *others: TrainerCallback, **fields: Any):
    """A ``Trainer`` that is given what ``plan`` says."""
    num_rows, data_seed = fields.pop("num_rows", 24), fields.pop("data_seed", 42)
    data = plan.dataset(make_data(num_rows), data_seed=data_seed)
    fields = {"max_steps": plan.num_steps} | fields
    return make_trainer(folder, data, *plan.callbacks(), *others, **fields)


def plain_rows(folder: Path, num_steps: int, *, num_rows: int = 24, **fields: Any) -> list[int]:
    """What a ``Trainer`` reads by itself."""
    reads = Reads()
    options = {"train_sampling_strategy": "random", "save_strategy": "no", "max_steps": num_steps}
    make_trainer(folder, make_data(num_rows), reads, **(options | fields)).train()
    return reads.flat


# The plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_flops", [None, 1.4e18])
@pytest.mark.parametrize("variant", ["full", "stochastic", "none"])
@pytest.mark.parametrize("recipe", ["s_low_rank_32_guided", "s_block_dense_32_guided"])
def test_it_is_that_of_factorlm_train(recipe: str, variant: str, budget_flops: Any) -> None:
    changes = ["--guide.variant", variant, "--guide.schedule", "linear", "--seed", "3"]
    changes += [] if budget_flops is None else ["--budget.flops", str(budget_flops)]
    config = load_recipe(PAPERS / f"{recipe}.yaml", changes)
    model, _ = build_model(config)
    guide = {"control": True} if variant == "none" else {"variant": variant}
    plan = plan_for_budget(
        model,
        num_original_steps=config.num_steps,
        rows_per_step=512,
        seq_len=1024,
        budget_flops=budget_flops,
        kind="linear",
        seed=3,
        **guide,
    )
    wanted = plan_steps(config, model)
    assert plan.num_steps == wanted.num_steps > wanted.num_original_steps
    assert plan.steps.num_original_steps == wanted.num_original_steps
    assert plan.steps.guide == wanted.guide
    assert (wanted.guide is None) == (variant == "none")
    assert plan.steps.total.model_flops == wanted.total.model_flops


@pytest.mark.parametrize(("size", "share"), [("s", 0.3007), ("xl", 0.4316)])
def test_the_papers_share(size: str, share: float) -> None:
    """Of low_rank at 32 %, as solved by hand."""
    config = load_recipe(PAPERS / f"{size}_low_rank_32_guided.yaml")
    model, _ = build_model(config)
    sizes = {"num_original_steps": config.num_steps, "rows_per_step": 512, "seq_len": 1024}
    plan = plan_for_budget(model, variant="stochastic", **sizes)
    found = plan.steps.guide.num_steps / config.num_steps
    assert found == pytest.approx(share, abs=0.5 / config.num_steps + 0.5e-4)


def test_the_default_budget_is_the_dense_models() -> None:
    """Met to one guided step, and by the control to one step from below."""
    step = training_flops(build(dense=True), seq_len=LENGTH, num_tokens=ROWS * LENGTH)
    dense, plan = NUM_ORIGINAL * step.model_flops, make_plan()
    assert plan.steps.guide.num_steps == plan.steps.num_replayed_steps == NUM_GUIDED
    dearest = (plan.steps.step + plan.steps.guided_step).model_flops
    assert plan.steps.total.model_flops == pytest.approx(dense, abs=dearest)
    steps = make_plan(control=True).steps
    assert steps.num_steps == NUM_CONTROL
    assert 0 <= dense - steps.total.model_flops < steps.step.model_flops


# The rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [24, 22, 3])
@pytest.mark.parametrize("seed", [{}, {"seed": 7}, {"data_seed": 7}])
def test_original_steps_read_what_a_plain_run_reads_and_the_guided_ones_come_again(
    num_rows: int, seed: dict[str, int], tmp_path: Path
) -> None:
    """In the same order, also where the last step of a plain run's epoch is short."""
    reads = Reads()
    fields = {"num_rows": num_rows, "data_seed": 7 if seed else 42, "save_strategy": "no"}
    trainer = planned(tmp_path, make_plan(), reads, **fields)
    trainer.train()
    steps = [reads.rows[step] for step in range(NUM_STEPS)]
    assert len(reads.rows) == trainer.state.global_step == NUM_STEPS
    assert steps[NUM_ORIGINAL:] == steps[:NUM_GUIDED]
    assert all(len(rows) == ROWS for rows in steps)
    plain = plain_rows(tmp_path, 14, num_rows=num_rows, **seed)
    original = reads.flat[: NUM_ORIGINAL * ROWS]
    assert original[: len(plain)] == plain[: len(original)]
    assert original != sorted(original)


def test_the_control_goes_on_to_new_rows_without_guides(tmp_path: Path) -> None:
    reads, plan = Reads(), make_plan(control=True)
    trainer = planned(tmp_path, plan, reads, save_strategy="no")
    assert not guided_layers(trainer.model)
    trainer.train()
    assert trainer.state.global_step == NUM_CONTROL
    assert reads.flat == plain_rows(tmp_path, NUM_CONTROL)
    assert not reads.guided


def test_without_a_seed_rows_keep_their_order(tmp_path: Path) -> None:
    """In accumulated batches too."""
    reads = Reads()
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    planned(tmp_path, make_plan(), reads, data_seed=None, save_strategy="no", **fields).train()
    original = [position % 24 for position in range(NUM_ORIGINAL * ROWS)]
    assert reads.flat == original + original[: NUM_GUIDED * ROWS]


def test_rows_by_number() -> None:
    """As many as there are steps; no row from the end by a negative number."""
    rows = make_plan().dataset(make_data())
    assert len(rows) == NUM_STEPS * ROWS
    assert torch.equal(rows[0]["input_ids"], rows[NUM_ORIGINAL * ROWS]["input_ids"])
    for index in (-1, NUM_STEPS * ROWS):
        with pytest.raises(IndexError):
            rows[index]


# The run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, Reads]:
    """A run that was not cut, with its checkpoints."""
    folder, reads = tmp_path_factory.mktemp("whole"), Reads()
    trainer = planned(folder, make_plan(), reads)
    trainer.train()
    return folder, trainer, reads


def test_guides_are_there_for_the_solved_steps(whole: Any) -> None:
    _, trainer, reads = whole
    assert reads.guided == list(range(NUM_GUIDED))
    assert trainer.state.max_steps == trainer.state.global_step == NUM_STEPS
    names = [name for name, _ in build().named_parameters()]
    assert [name for name, _ in trainer.model.named_parameters()] == names


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("step", [2, 4, 8, 10, 12])
def test_a_resumed_run_is_bit_equal(step: int, restored: bool, whole: Any, tmp_path: Path) -> None:
    """From among the guided steps, after them, and among the replayed ones; also with a callback
    that transformers makes from what the checkpoint says."""
    folder, first, all_reads = whole
    reads, fields = Reads(), {"restore_callback_states_from_checkpoint": restored}
    second = planned(tmp_path, make_plan(), reads, model=build(seed=1), **fields)
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert reads.rows == {s: all_reads.rows[s] for s in range(step, NUM_STEPS)}
    assert reads.guided == list(range(step, NUM_GUIDED))
    wanted = first.model.state_dict()
    assert list(second.model.state_dict()) == list(wanted)
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_number_of_steps_in_the_place_of_a_share(tmp_path: Path) -> None:
    """Without a plan."""
    reads = Reads()
    guidance = SelfGuidedTraining(num_steps=3)
    make_trainer(tmp_path, make_data(), guidance, reads, max_steps=7, save_strategy="no").train()
    assert reads.guided == [0, 1, 2]


# What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_original_steps": 0}, "num_original_steps=0 must be at least 1"),
        ({"rows_per_step": 0}, "rows_per_step=0 must be at least 1"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"budget_flops": -1.0}, r"budget_flops=-1\.0 must be above 0 and finite"),
        ({"budget_flops": float("inf")}, "budget_flops=inf must be above 0 and finite"),
        ({"budget_flops": 1.0}, "^budget_flops=1 leaves nothing for a guide"),
        ({"budget_flops": 1.0, "control": True}, "^budget_flops=1 is under one step"),
        ({"budget_flops": 1e9}, "^budget_flops=1e.09 would .* state more num_original_steps"),
        ({"kind": "square"}, "kind='square'"),
        ({"variant": "none"}, "variant='none'"),
    ],
)
def test_values_of_a_plan(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(**fields)


def test_models_that_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="no structured layer to guide"):
        plan_for_budget(build(dense=True), **SIZES)
    model = build()
    attach_guides_(model)
    with pytest.raises(ConfigError, match="make the plan before attach_guides_"):
        plan_for_budget(model, **SIZES)


@pytest.mark.parametrize(
    ("data", "message"),
    [(iter([1]), "data=list_iterator must have a length"), ([], "data must have a row")],
)
def test_data_without_rows(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan().dataset(data)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": 10}, "max_steps=10 must be the plan's num_steps=14"),
        ({"max_steps": -1, "num_train_epochs": 2}, "max_steps=28 must be the plan's"),
        ({"per_device_train_batch_size": 2}, "is 2 rows a step, .* rows_per_step=4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 .* is 8 rows"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random' must be"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True must be False"),
        (
            {"dataloader_in_order": False, "dataloader_num_workers": 1},
            "dataloader_in_order=False must be True",
        ),
    ],
)
def test_a_trainer_that_does_not_follow_its_plan(
    fields: dict[str, Any], message: str, control: bool, tmp_path: Path
) -> None:
    """Is refused before its first step, the control's too."""
    reads = Reads()
    trainer = planned(tmp_path, make_plan(control=control), reads, **fields)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert not reads.rows


@pytest.mark.parametrize("data", ["plain", "planned"])
def test_another_data_set(data: str, tmp_path: Path) -> None:
    """The rows themselves, and those of another plan of as many steps."""
    plan, rows = make_plan(), make_data()
    given = make_plan(control=True).dataset(rows) if data == "planned" else rows
    assert data == "plain" or len(given) == len(plan.dataset(rows))
    trainer = make_trainer(tmp_path, given, *plan.callbacks())
    with pytest.raises(ConfigError, match=r"train_dataset=.* must be what this plan's"):
        trainer.train()


def test_resuming_on_another_plan(whole: Any, tmp_path: Path) -> None:
    trainer = planned(tmp_path, make_plan(variant="full"))
    message = "num_steps=3 of SelfGuidedTraining differs from the checkpoint's num_steps=4"
    with pytest.raises(ConfigError, match=message):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-8"))


def test_a_number_of_steps_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"share=0\.5 and num_steps=3: state one"):
        SelfGuidedTraining(0.5, num_steps=3)
    with pytest.raises(ConfigError, match="num_steps=0 must be at least 1"):
        SelfGuidedTraining(num_steps=0)
    trainer = make_trainer(tmp_path, make_data(), SelfGuidedTraining(num_steps=3), max_steps=2)
    with pytest.raises(ConfigError, match="num_steps=3 must be at most max_steps=2"):
        trainer.train()


# Two processes -------------------------------------------------------------------------------


def _train_replica(folder: str) -> list[tuple[dict[int, list[int]], list[int]]]:
    """A run in batches of one row, two of them accumulated, and its end once more, resumed."""
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found = []
    for checkpoint in (None, f"{folder}/checkpoint-12"):
        reads = Reads()
        planned(folder, make_plan(), reads, **fields).train(resume_from_checkpoint=checkpoint)
        found.append((dict(reads.rows), reads.guided))
        dist.barrier()
    return found


@pytest.mark.slow
def test_two_processes_share_the_rows_of_each_step(whole: Any, tmp_path: Path) -> None:
    """Those that one process reads, in every other place."""
    replicas = run_distributed(_train_replica, 2, str(tmp_path), timeout_s=300.0)
    for rank, runs in enumerate(replicas):
        for first, (rows, guided) in zip((0, 12), runs, strict=True):
            assert guided == list(range(first, NUM_GUIDED))
            wanted = {step: whole[2].rows[step][rank::2] for step in range(first, NUM_STEPS)}
            assert rows == wanted

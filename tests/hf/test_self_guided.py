"""``SelfGuidedTraining`` in the Hugging Face ``Trainer``: its time, its end, its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import load_sharded_checkpoint

from factorlm.errors import CheckpointError, ConfigError
from factorlm.hf import SelfGuidedTraining, build_causal_lm, load
from factorlm.layers import BlockDenseConfig, BlockShuffleConfig, LowRankConfig, StructureConfig
from factorlm.optim import build_optimizer
from factorlm.surgery import attach_guides_, guided_layers
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids

MAX_STEPS, SHARE, NUM_GUIDED = 10, 0.6, 6
SEED = 4
"""Leaves the guides out of steps 1, 4 and 5, and so before and after two of the checkpoints."""
SKIPPED = [1, 4, 5]
GUIDED_CHECKPOINTS, PLAIN_CHECKPOINTS = [2, 4], [6, 8, 10]
STRUCTURES: dict[str, StructureConfig] = {
    "low_rank": LowRankConfig(rank=4),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=8),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def build(structure: str = "low_rank", *, family: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """GPT-2 has what can go wrong: tied weights, biases, and dropout, which needs its RNG back."""
    return build_causal_lm(TINY_CONFIGS[family](), STRUCTURES[structure], seed=seed)


def make_trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    model: PreTrainedModel | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    model_init: Callable[[], PreTrainedModel] | None = None,
    batch: int = 4,
    **fields: Any,
) -> Trainer:
    """Six batches an epoch, so that the run crosses one."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny_input_ids(batch=24)]
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        model=(model or build()) if model_init is None else None,
        model_init=model_init,
        args=TrainingArguments(**(arguments | fields)),
        train_dataset=rows,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def guidance(**fields: Any) -> SelfGuidedTraining:
    values = {"share": SHARE, "seed": SEED, "variant": "stochastic"} | fields
    return SelfGuidedTraining(**values)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(tiny_input_ids()).logits


class Probe(TrainerCallback):
    """Notes, in every step, what the guides are set to and how the step changes them."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.seen: dict[int, set[tuple[float, bool]]] = {}
        self.changed: dict[int, set[int]] = {}
        self.saves: dict[int, int] = {}
        self.stop_after = stop_after

    def on_step_begin(self, args, state, control, model, optimizer, **others) -> None:
        self.before = {
            name: _trained(layer.guide.weight, optimizer)
            for name, layer in guided_layers(model).items()
        }

    def on_pre_optimizer_step(self, args, state, control, model, **others) -> None:
        layers = guided_layers(model).values()
        self.seen[state.global_step] = {(float(layer.alpha), layer.skipped) for layer in layers}
        for layer in layers:
            assert (layer.guide.weight.grad is None) == layer.skipped

    def on_optimizer_step(self, args, state, control, model, optimizer, **others) -> None:
        self.changed[state.global_step] = {
            _num_different(self.before[name], _trained(layer.guide.weight, optimizer))
            for name, layer in guided_layers(model).items()
        }

    def on_step_end(self, args, state, control, **others) -> None:
        if state.global_step == self.stop_after:
            control.should_training_stop = True

    def on_save(self, args, state, control, model, **others) -> None:
        self.saves[state.global_step] = len(guided_layers(model))


def _trained(weight: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weight and its optimizer state, as they are now."""
    tensors = [weight, *optimizer.state.get(weight, {}).values()]
    return [tensor.detach().clone() for tensor in tensors]


def _num_different(before: list[Tensor], after: list[Tensor]) -> int:
    pairs = zip(before, after, strict=False)
    return sum(not torch.equal(*pair) for pair in pairs) + len(after) - len(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Trainer, Probe]]:
    """Whole runs, each made once."""
    made: dict[tuple[str, str], tuple[Path, Trainer, Probe]] = {}

    def run(
        variant: str = "stochastic", structure: str = "low_rank"
    ) -> tuple[Path, Trainer, Probe]:
        key = (variant, structure)
        if key not in made:
            folder, probe = tmp_path_factory.mktemp("-".join(key)), Probe()
            model = build(structure)
            trainer = make_trainer(folder, guidance(variant=variant), probe, model=model)
            trainer.train()
            made[key] = folder, trainer, probe
        return made[key]

    return run


class TestTime:
    @pytest.mark.parametrize("kind", ["cosine", "linear"])
    def test_alpha_follows_the_schedule(self, kind: str, tmp_path: Path) -> None:
        """A step of two batches moves it once."""
        probe = Probe()
        fields = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
        make_trainer(tmp_path, guidance(kind=kind), probe, **fields).train()
        assert list(probe.seen) == list(range(MAX_STEPS))
        for step, seen in probe.seen.items():
            done = step / NUM_GUIDED
            alpha = 1 - done if kind == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
            if step >= NUM_GUIDED:
                assert not seen
                continue
            ((found, skipped),) = seen
            assert found == pytest.approx(alpha, abs=1e-6)
            if kind == "cosine":
                assert skipped == (step in SKIPPED)

    def test_the_full_variant_skips_no_step(self, runs: Any) -> None:
        _, _, probe = runs("full")
        skipped = {skipped for seen in probe.seen.values() for _, skipped in seen}
        assert skipped == {False}

    @every_structure
    def test_a_skipped_step_leaves_weight_moments_and_step_count(
        self, structure: str, runs: Any
    ) -> None:
        """AdamW's ``step``, ``exp_avg``, ``exp_avg_sq``; the other steps change all four."""
        _, _, probe = runs(structure=structure)
        wanted = {step: {0 if step in SKIPPED else 4} for step in range(NUM_GUIDED)}
        assert probe.changed == wanted | {step: set() for step in range(NUM_GUIDED, MAX_STEPS)}

    def test_evaluation_during_guidance_runs_the_guides(self, tmp_path: Path) -> None:
        """With α as it stands, in a skipped step too."""
        probe = Probe(stop_after=2)
        trainer = make_trainer(tmp_path, guidance(), probe)
        trainer.train()
        assert [skipped for _, skipped in probe.seen[1]] == [True]
        before = logits(trainer.model)
        with torch.no_grad():
            for layer in guided_layers(trainer.model).values():
                layer.guide.weight += 0.1
        assert not torch.allclose(logits(trainer.model), before)


class TestEnd:
    @every_structure
    def test_nothing_of_the_guides_is_left(self, structure: str, runs: Any) -> None:
        _, trainer, _ = runs(structure=structure)
        model, optimizer = trainer.model, trainer.optimizer
        names = [name for name, _ in model.named_parameters()]
        assert not guided_layers(model)
        assert names == [name for name, _ in build(structure).named_parameters()]
        assert {id(weight) for weight in optimizer.state} == {id(w) for w in model.parameters()}
        held = [weight for group in optimizer.param_groups for weight in group["params"]]
        assert sum(weight.numel() for weight in held) == sum(w.numel() for w in model.parameters())
        assert all(weight.grad is None for weight in held)
        assert "save_pretrained" not in model.__dict__

    def test_they_go_before_the_last_guided_steps_save(self, runs: Any) -> None:
        _, _, probe = runs()
        num_layers = len(guided_layers(_attached(build())))
        wanted = dict.fromkeys(GUIDED_CHECKPOINTS, num_layers) | dict.fromkeys(PLAIN_CHECKPOINTS, 0)
        assert probe.saves == wanted

    @every_structure
    @pytest.mark.parametrize("step", PLAIN_CHECKPOINTS)
    def test_what_is_saved_then_is_an_ordinary_model(
        self, step: int, structure: str, runs: Any
    ) -> None:
        folder, trainer, _ = runs(structure=structure)
        saved = folder / f"checkpoint-{step}"
        plain = build(structure)
        plain.save_pretrained(folder / "plain")
        files = [load_file(path / "model.safetensors") for path in (saved, folder / "plain")]
        assert list(files[0]) == list(files[1])
        config = json.loads((saved / "config.json").read_text())
        assert config["quantization_config"] == plain.config.quantization_config
        loaded = load(saved)
        if step == MAX_STEPS:
            assert torch.equal(logits(loaded), logits(trainer.model))

    def test_a_share_of_one_ends_with_the_run(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, guidance(share=1.0), max_steps=3)
        trainer.train()
        assert torch.equal(logits(load(tmp_path / "checkpoint-3")), logits(trainer.model))

    def test_the_guides_start_as_the_loaded_layers_maps(self, tmp_path: Path) -> None:
        build(family="starcoder2").save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        expected = logits(model)
        make_trainer(tmp_path / "out", guidance(), model=model)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
        assert {float(layer.alpha) for layer in guided_layers(model).values()} == {1.0}


class TestResume:
    @pytest.mark.parametrize("step", GUIDED_CHECKPOINTS + PLAIN_CHECKPOINTS[:2])
    @pytest.mark.parametrize("variant", ["stochastic", "full"])
    @every_structure
    def test_is_bit_equal_to_the_run_that_was_not_cut(
        self, structure: str, variant: str, step: int, runs: Any, tmp_path: Path
    ) -> None:
        folder, whole, _ = runs(variant, structure)
        probe, model = Probe(), build(structure, seed=1)
        trainer = make_trainer(tmp_path, guidance(variant=variant), probe, model=model)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        guided = {step for step, seen in probe.seen.items() if seen}
        assert guided == set(range(step, NUM_GUIDED)), "those that are over have no guides"
        assert_same(weights(trainer.model), weights(whole.model))
        assert _moments(trainer) == _moments(whole)

    def test_with_the_callbacks_state_restored(self, runs: Any, tmp_path: Path) -> None:
        """transformers then makes a callback of its own, from what the checkpoint says."""
        folder, whole, _ = runs()
        fields = {"restore_callback_states_from_checkpoint": True}
        given = SelfGuidedTraining(share=0.9, seed=7, variant="full")
        trainer = make_trainer(tmp_path, given, model=build(seed=1), **fields)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert_same(weights(trainer.model), weights(whole.model))

    def test_twice(self, runs: Any, tmp_path: Path) -> None:
        """A resumed run's checkpoints, after guidance, are as good as the first's."""
        folder, whole, _ = runs()
        first = make_trainer(tmp_path, guidance(), model=build(seed=1))
        first.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
        second = make_trainer(tmp_path, guidance(), model=build(seed=2))
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert_same(weights(second.model), weights(whole.model))

    @pytest.mark.parametrize("step", [2, 6])
    def test_with_an_optimizer_of_ones_own(self, step: int, tmp_path: Path) -> None:
        """Muon on factors and guides; made after ``attach_guides_``."""

        def make(folder: Path, seed: int) -> Trainer:
            model = _attached(build(seed=seed))
            optimizer = build_optimizer(model, kind="muon", learning_rate=1e-2)
            return make_trainer(folder, guidance(), model=model, optimizer=optimizer)

        whole = make(tmp_path / "whole", 0)
        whole.train()
        held = sum(weight.numel() for g in whole.optimizer.param_groups for weight in g["params"])
        assert held == sum(weight.numel() for weight in whole.model.parameters())
        cut = make(tmp_path / "cut", 1)
        cut.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(weights(cut.model), weights(whole.model))

    def test_a_model_init_attaches_them_itself(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, guidance(), model_init=lambda: _attached(build()))
        trainer.train()
        assert torch.equal(logits(load(tmp_path / "checkpoint-10")), logits(trainer.model))


def _attached(model: PreTrainedModel) -> PreTrainedModel:
    attach_guides_(model)
    return model


def _moments(trainer: Trainer) -> dict[str, dict[str, list[float]]]:
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    return {
        names[weight]: {key: value.flatten().tolist() for key, value in state.items()}
        for weight, state in trainer.optimizer.state.items()
    }


class TestCheckpoint:
    """A folder that is saved while there are guides."""

    def test_holds_them_beside_the_names_of_the_model(self, runs: Any) -> None:
        folder, _, _ = runs()
        saved = load_file(folder / "checkpoint-4" / "model.safetensors")
        plain = load_file(folder / "checkpoint-10" / "model.safetensors")
        layers = [f"{name}.guide.weight" for name in guided_layers(_attached(build()))]
        assert set(saved) == {*plain, *layers}

    def test_is_marked_and_opens_as_no_model(self, runs: Any) -> None:
        folder, _, _ = runs()
        saved = folder / "checkpoint-4"
        block = json.loads((saved / "config.json").read_text())["quantization_config"]
        assert block == build().config.quantization_config | {"guided": True}
        message = "a checkpoint of self-guided training.* resume it"
        with pytest.raises(CheckpointError, match=message):
            load(saved)
        with pytest.raises(ConfigError, match=message):
            AutoModelForCausalLM.from_pretrained(saved)

    def test_a_run_that_stops_early_saves_one(self, tmp_path: Path) -> None:
        """In shards too. The model itself stays unmarked."""
        trainer = make_trainer(tmp_path, guidance(), Probe(stop_after=3))
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        with pytest.raises(CheckpointError, match="guided=True"):
            load(tmp_path / "shards")
        assert "guided" not in trainer.model.config.quantization_config
        other = _attached(build(seed=1))
        load_sharded_checkpoint(other, tmp_path / "shards", strict=False)
        other.tie_weights()
        assert_same(weights(other), weights(trainer.model))

    def test_of_weights_alone_is_resumed(self, tmp_path: Path) -> None:
        make_trainer(tmp_path, guidance(), save_only_model=True).train()
        probe = Probe(stop_after=3)
        trainer = make_trainer(tmp_path / "two", guidance(), probe, model=build(seed=1))
        saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
        for name, layer in guided_layers(trainer.model).items():
            assert torch.equal(layer.guide.weight, saved[f"{name}.guide.weight"])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert list(probe.seen) == [2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"share": 0.0}, r"share=0.0 must lie in \(0, 1\]"),
            ({"share": 1.5}, "share=1.5"),
            ({"kind": "square"}, "kind='square'"),
            ({"variant": "none"}, "variant='none'"),
            ({"form": "both"}, "form='both'"),
        ],
    )
    def test_values(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            SelfGuidedTraining(**fields)

    def test_a_share_of_no_step(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, guidance(share=0.01))
        with pytest.raises(ConfigError, match=r"share=0\.01 of max_steps=10"):
            trainer.train()

    def test_load_best_model_at_end(self, tmp_path: Path) -> None:
        fields = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        trainer = make_trainer(tmp_path, guidance())
        for name, value in fields.items():
            setattr(trainer.args, name, value)
        with pytest.raises(ConfigError, match="load_best_model_at_end=True"):
            trainer.train()

    def test_deepspeed(self, tmp_path: Path) -> None:
        """When the ``Trainer`` is made, before anything is changed, and when training begins."""
        model = build()
        trainer = make_trainer(tmp_path, guidance(), model=model)
        trainer.args.deepspeed_plugin = object()
        with pytest.raises(ConfigError, match="does not run under DeepSpeed: use DDP"):
            trainer.train()
        plain, arguments = build(), (trainer.args, trainer.state, trainer.control)
        with pytest.raises(ConfigError, match="does not run under DeepSpeed: use DDP"):
            guidance().on_init_end(*arguments, model=plain)
        assert not guided_layers(plain)

    def test_a_model_without_structured_layers(self, tmp_path: Path) -> None:
        dense = build_causal_lm(TINY_CONFIGS["gpt2"]())
        with pytest.raises(ConfigError, match="no structured layer to guide"):
            make_trainer(tmp_path, guidance(), model=dense)

    def test_an_optimizer_that_was_made_before(self, tmp_path: Path) -> None:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(ConfigError, match="call attach_guides_"):
            make_trainer(tmp_path, guidance(), model=model, optimizer=optimizer)
        attach_guides_(model)
        trainer = make_trainer(tmp_path, guidance(), model=model, optimizer=optimizer)
        with pytest.raises(ConfigError, match=r"guide\.weight is in no group of the optimizer"):
            trainer.train()

    def test_a_callback_that_came_too_late(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path)
        trainer.add_callback(guidance())
        with pytest.raises(ConfigError, match="the model has no guides"):
            trainer.train()

    def test_training_twice(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, guidance(), save_strategy="no", max_steps=2)
        trainer.train()
        with pytest.raises(ConfigError, match="new Trainer"):
            trainer.train()

    @pytest.mark.parametrize(
        ("fields", "max_steps", "message"),
        [
            ({"seed": 5}, MAX_STEPS, "seed=5 .* checkpoint's seed=4"),
            ({"variant": "full"}, MAX_STEPS, "variant='full' .* variant='stochastic'"),
            ({}, 20, r"num_steps=12 \(share x max_steps\) .* num_steps=6"),
        ],
    )
    @pytest.mark.parametrize("step", [4, 8])
    def test_resuming_on_another_schedule(
        self, fields: Any, max_steps: int, message: str, step: int, runs: Any, tmp_path: Path
    ) -> None:
        folder, _, _ = runs()
        trainer = make_trainer(tmp_path, guidance(**fields), max_steps=max_steps)
        with pytest.raises(ConfigError, match=message):
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))

    def test_resuming_a_longer_run_with_the_share_that_keeps_the_schedule(
        self, runs: Any, tmp_path: Path
    ) -> None:
        folder, _, _ = runs()
        trainer = make_trainer(tmp_path, guidance(share=SHARE / 2), max_steps=2 * MAX_STEPS)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
        assert trainer.state.global_step == 2 * MAX_STEPS

    def test_a_checkpoint_of_a_run_without_the_callback(self, tmp_path: Path) -> None:
        make_trainer(tmp_path, max_steps=2, save_only_model=True).train()
        trainer = make_trainer(tmp_path / "two", guidance())
        with pytest.raises(ConfigError, match="not of one run with SelfGuidedTraining"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

"""The loop: what one step is, what resumes, what is refused."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stopping import StopAt
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from factorlm.data import EvalWindows, TokenLoader, open_dataset
from factorlm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InterruptedRun,
    NumericError,
    StorageError,
)
from factorlm.hf import load
from factorlm.optim import learning_rate_at
from factorlm.records import EvalRecord, EventRecord, Record, RecordFile, RunRecord, StepRecord
from factorlm.train import TrainConfig
from factorlm.train.assemble import build_model
from factorlm.train.callbacks import Callback
from factorlm.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def fit(config: TrainConfig, runs: Path, *callbacks: Callback) -> list[Record]:
    trainer = Trainer(config, runs_dir=runs, callbacks=callbacks)
    trainer.fit()
    return list(RecordFile(trainer.run.records.path))


def losses(records: list[Record]) -> list[float]:
    return [record.loss for record in records if isinstance(record, StepRecord)]


def weights(runs: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(runs / "tiny" / folder / "model.safetensors")


def by_hand(config: TrainConfig) -> tuple[list[float], list[float], torch.nn.Module]:
    """The same training with the model's own loss and nothing of the Trainer."""
    model, _ = build_model(config, device="cpu")
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    data = open_dataset(config.data.path)
    loader = TokenLoader(data, context_length=16, sequences_per_step=8, seed=0)
    found, norms = [], []
    for step in range(config.num_steps):
        ids = torch.from_numpy(loader.batch(step))
        logits = model(input_ids=ids[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config.num_steps, peak=1e-3)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, norms, model


def test_a_run_equals_a_loop_written_by_hand(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config()
    wanted, norms, model = by_hand(config)
    records = fit(config, tmp_path)
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [record.loss for record in steps] == pytest.approx(wanted, rel=1e-5)
    assert [record.grad_norm for record in steps] == pytest.approx(norms, rel=1e-4)
    assert [record.num_tokens for record in steps] == [128 * n for n in range(1, 11)]
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_accumulation_changes_nothing_but_rounding(tiny_config: MakeConfig, tmp_path: Path) -> None:
    whole = losses(fit(tiny_config(), tmp_path / "a"))
    parts = losses(fit(tiny_config(batch={"micro_batch": 3}), tmp_path / "b"))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_activation_checkpointing_is_exact_with_dropout(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    overrides = {"hidden_size": 32, "intermediate_size": 64, "residual_dropout": 0.3}
    found = []
    for again in (False, True, "ffn"):
        config = tiny_config(
            model={"overrides": overrides}, parallel={"activation_checkpointing": again}
        )
        found.append(losses(fit(config, tmp_path / str(again))))
    assert found[0] == found[1] == found[2]


def test_the_validation_loss_is_that_of_every_window(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(eval={"every_steps": 4, "num_tokens": 256, "num_sequences": 5})
    records = fit(config, tmp_path)
    evals = [record for record in records if isinstance(record, EvalRecord)]
    data = open_dataset(config.data.path)
    assert [record.step for record in evals] == [4, 8, 10, 10]
    assert [record.num_eval_tokens for record in evals[:3]] == [320] * 3  # 4 batches of 5 x 16
    assert evals[-1].num_eval_tokens == data.split("validation").num_tokens - 1
    model = load(tmp_path / "tiny" / "model")
    nats, count = 0.0, 0
    with torch.no_grad():
        for batch in EvalWindows(data, context_length=16, batch_size=64):
            logits = model(input_ids=torch.from_numpy(batch.inputs)).logits.flatten(0, 1)
            targets = torch.from_numpy(batch.targets).flatten()
            nats += functional.cross_entropy(logits, targets, reduction="sum").item()
            count += batch.num_targets
    assert evals[-1].loss == pytest.approx(nats / count, rel=1e-5)
    assert evals[-1].perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    bits = nats / math.log(2) / data.split("validation").num_text_bytes
    assert evals[-1].bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_the_best_model_is_chosen_on_equal_text(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(eval={"every_steps": 5, "num_tokens": 256, "num_sequences": 4})
    evals = [r for r in fit(config, tmp_path) if isinstance(r, EvalRecord)]
    on_part = {record.step: record.loss for record in evals[:-1]}
    assert on_part[10] < on_part[5]
    last, best = weights(tmp_path, "model"), weights(tmp_path, "model-best")
    assert all(torch.equal(last[name], best[name]) for name in last)


def test_a_run_leaves_models_that_plain_transformers_opens(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    records = fit(tiny_config(eval={"every_steps": 5}), tmp_path)
    run = next(record for record in records if isinstance(record, RunRecord))
    for folder in ("model", "model-best"):
        path = tmp_path / "tiny" / folder
        model = AutoModelForCausalLM.from_pretrained(path)
        assert sum(p.numel() for p in model.parameters()) == run.num_params
        assert model.model.layers[1].mlp.c_fc.V.shape == (8, 32)
        assert AutoTokenizer.from_pretrained(path)("ab").input_ids == [97, 98]
    assert run.config == tiny_config(eval={"every_steps": 5}).to_dict()
    assert run.training_flops == 3 * run.forward_flops_per_token * 1280
    events = [record.event for record in records if isinstance(record, EventRecord)]
    assert events[-1] == "finished"


@pytest.mark.parametrize("in_eval", [False, True])
def test_stopped_anywhere_and_resumed_is_bit_equal(
    tiny_config: MakeConfig, tmp_path: Path, in_eval: bool
) -> None:
    config = tiny_config(eval={"every_steps": 5, "num_sequences": 4})
    wanted = fit(config, tmp_path / "whole")
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(InterruptedRun, match="SIGUSR1"):
        fit(config, tmp_path / "cut", StopAt(5, in_eval=in_eval))
    assert signal.getsignal(signal.SIGUSR1) == before
    found = fit(config, tmp_path / "cut")
    assert losses(found) == losses(wanted)
    for records in (found, wanted):
        evals = [(r.step, r.loss) for r in records if isinstance(r, EvalRecord)]
        assert [step for step, _ in evals] == [5, 10]
    for folder in ("model", "model-best"):
        one, two = weights(tmp_path / "whole", folder), weights(tmp_path / "cut", folder)
        assert all(torch.equal(one[name], two[name]) for name in one)


class Poison(Callback):
    """Makes a weight NaN after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            with torch.no_grad():
                next(trainer.model.parameters())[0] = float("nan")


def saved_steps(runs: Path) -> list[str]:
    return sorted(path.name for path in (runs / "tiny" / "checkpoints").iterdir())


def test_what_a_killed_process_left_half_written_is_cleared(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        fit(tiny_config(), tmp_path, StopAt(3))
    run = tmp_path / "tiny"
    for leftover in (run / ".tmp-model-best-00aa", run / "checkpoints" / ".tmp-step-9-00bb"):
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
    fit(tiny_config(), tmp_path)
    assert not list(run.rglob(".tmp-*"))


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(checkpoint={"every_steps": 3})
    with pytest.raises(NumericError, match="step 8: loss nan") as error:
        fit(config, tmp_path, Poison(7))
    assert "embed_tokens.weight" in str(error.value)
    assert error.value.exit_code == 8
    assert saved_steps(tmp_path) == ["step-3", "step-6"]
    assert losses(fit(config, tmp_path)) == losses(fit(config, tmp_path / "undisturbed"))


def test_no_checkpoint_holds_a_weight_that_is_not_finite(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(NumericError, match=r"not saved: .* model\.embed_tokens\.weight"):
        fit(tiny_config(checkpoint={"every_steps": 3}), tmp_path, Poison(6))
    assert saved_steps(tmp_path) == ["step-3"]


def test_another_recipe_or_other_data_in_the_same_folder_is_refused(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        fit(tiny_config(), tmp_path, StopAt(3))
    with pytest.raises(ConfigError, match=r"seed=1, was 0"):
        fit(tiny_config(seed=1), tmp_path)
    with pytest.raises(ConfigError, match=r"structure\.rank=4, was 8"):
        fit(tiny_config(structure={"structure": "low_rank", "rank": 4}), tmp_path)
    fit(tiny_config(eval={"every_steps": 5}), tmp_path)


def test_a_full_disk_does_not_end_the_run_until_the_third_time(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([True, True, False] + [True] * 9)

    def save(*args: Any, **kwargs: Any) -> None:
        if next(failures):
            raise StorageError("no space")

    monkeypatch.setattr("factorlm.train.run.save_checkpoint", save)
    with pytest.raises(StorageError, match="no space"):
        fit(tiny_config(checkpoint={"every_steps": 1}), tmp_path)
    records = list(RecordFile(tmp_path / "tiny" / "records.jsonl"))
    events = [r.event for r in records if isinstance(r, EventRecord)]
    assert events == ["save failed", "save failed", "saved", "save failed", "save failed"]
    assert len(losses(records)) == 6


@pytest.mark.filterwarnings("ignore:checkpoint left out")
def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        fit(tiny_config(), tmp_path, StopAt(3))
    (tmp_path / "tiny" / "checkpoints" / "step-4" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        fit(tiny_config(), tmp_path)


def test_two_trainers_in_one_folder(tiny_config: MakeConfig, tmp_path: Path) -> None:
    class Second(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 2:
                with pytest.raises(StorageError, match="in use by factorlm train"):
                    fit(tiny_config(), tmp_path)

    fit(tiny_config(), tmp_path, Second())


def test_init_from_continues_from_weights(tiny_config: MakeConfig, tmp_path: Path) -> None:
    fit(tiny_config(), tmp_path)
    model = {"preset": None, "init_from": str(tmp_path / "tiny"), "overrides": {}}
    again = tiny_config(name="again", model=model, structure={})
    first = losses(fit(again, tmp_path))[0]
    data = open_dataset(again.data.path)
    ids = TokenLoader(data, context_length=16, sequences_per_step=8, seed=0).batch(0)
    trained = load(tmp_path / "tiny")
    with torch.no_grad():
        logits = trained(input_ids=torch.from_numpy(ids[:, :-1])).logits.flatten(0, 1)
    wanted = functional.cross_entropy(logits, torch.from_numpy(ids[:, 1:]).flatten())
    assert first == pytest.approx(wanted.item(), rel=1e-5)


def test_a_vocabulary_under_the_tokenizers_is_refused(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=200 is under the 257"):
        fit(tiny_config(model={"vocab_size": 200}), tmp_path)


def test_data_that_is_not_there_comes_with_the_command_that_makes_it(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    data = {"path": str(tmp_path / "none"), "source": ["a b.txt"], "tokenizer": "bpe:300"}
    with pytest.raises(
        DataError, match=r"factorlm prepare 'a b\.txt' -o .*none --tokenizer bpe:300"
    ):
        fit(tiny_config(data=data), tmp_path)


def test_bf16_autocast_learns_nearly_the_same(tiny_config: MakeConfig, tmp_path: Path) -> None:
    exact = losses(fit(tiny_config(), tmp_path / "a"))
    near = losses(fit(tiny_config(parallel={"precision": "bf16"}), tmp_path / "b"))
    assert near != exact
    assert near == pytest.approx(exact, rel=1e-2)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "b").values())


def test_tensorboard_holds_the_same_numbers(tiny_config: MakeConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = fit(tiny_config(tracking={"tensorboard": True}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tiny" / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    assert found == pytest.approx(losses(records), rel=1e-6)


def test_outside_the_main_thread_signals_are_left_alone(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(losses(fit(tiny_config(), tmp_path))))
    thread.start()
    thread.join()
    assert len(found) == 10


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tiny_config: MakeConfig, tmp_path: Path) -> None:
    exact = losses(fit(tiny_config(), tmp_path / "a"))
    compiled = losses(fit(tiny_config(parallel={"compile": True}), tmp_path / "b"))
    assert compiled == pytest.approx(exact, rel=1e-4)


def test_a_refused_recipe_leaves_no_run_behind(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """So that the corrected recipe is not taken for a changed one."""
    config = tiny_config(optimizer={"kind": "sprectron"})
    with pytest.raises(ConfigError, match="Did you mean 'spectron'"):
        Trainer(config, runs_dir=tmp_path).fit()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "muon", "factor_rates": "structure_aware"}, "is for optimizer.kind='adamw'"),
        ({"base_width": 64}, "base_width=64 must be at least 1, beside"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
    ],
)
def test_optimizer_options_that_do_not_go_together(
    tiny_config: MakeConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(optimizer=options)

"""Checkpoints: exact, complete or absent, and any damage noticed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from factorlm.distributed import World
from factorlm.errors import CheckpointError, StorageError
from factorlm.optim import build_optimizer
from factorlm.testing.models import tiny_model
from factorlm.train.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    retain,
    save_checkpoint,
)
from factorlm.train.state import RunState, optimizer_tensors

ALONE = World(0, 1, torch.device("cpu"))
FACTS = {"data": "abc", "environment": {"torch": "x"}}


def trained(seed: int = 0, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = tiny_model("starcoder2")
    optimizer = build_optimizer(model, learning_rate=1e-2)
    ids = torch.randint(99, (2, 9))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(
    folder: Path, step: int = 7, seed: int = 0
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = trained(seed)
    state = RunState(step=step, num_tokens=70, best_loss=1.25, train_seconds=0.1)
    save_checkpoint(folder, model, optimizer, state, FACTS, ALONE)
    return model, optimizer


def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path)
    other, other_optimizer = trained(seed=1, steps=0)
    path = newest_checkpoint(tmp_path, ALONE)
    assert path == tmp_path / "step-7"
    state, facts = load_checkpoint(path, other, other_optimizer)
    assert state == RunState(step=7, num_tokens=70, best_loss=1.25, train_seconds=0.1)
    assert facts == FACTS
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    saved, loaded = dict(optimizer_tensors(optimizer)), dict(optimizer_tensors(other_optimizer))
    assert saved.keys() == loaded.keys()
    assert len(saved) == 3 * len(list(model.parameters()))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save(tmp_path)
    names = {path.name for path in (tmp_path / "step-7").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_every_flipped_bit_and_every_cut_is_noticed_and_the_older_one_taken(tmp_path: Path) -> None:
    save(tmp_path, step=5)
    save(tmp_path, step=7)
    chance = random.Random(0)
    newest = tmp_path / "step-7"
    files = sorted(newest.iterdir())
    for trial in range(40):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(damaged) if trial % 4 else whole[:place])
        with pytest.warns(UserWarning, match=path.name):
            assert newest_checkpoint(tmp_path, ALONE) == tmp_path / "step-5"
        path.write_bytes(whole)
    assert newest_checkpoint(tmp_path, ALONE) == newest


@pytest.mark.filterwarnings("ignore:checkpoint left out")
def test_none_good_is_an_error_with_every_reason(tmp_path: Path) -> None:
    save(tmp_path, step=5)
    save(tmp_path, step=7)
    for step in (5, 7):
        (tmp_path / f"step-{step}" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        newest_checkpoint(tmp_path, ALONE)
    assert "step-5" in str(error.value)
    assert "step-7" in str(error.value)


def test_junk_beside_checkpoints_is_not_looked_at(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent", ALONE) is None
    save(tmp_path, step=9)
    save(tmp_path, step=10)
    (tmp_path / ".tmp-step-11-abcd").mkdir()
    (tmp_path / "step-12").write_text("a file")
    (tmp_path / "step-13").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-x").mkdir()
    shutil.copytree(tmp_path / "step-9", tmp_path / "step-9-copy")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert newest_checkpoint(tmp_path, ALONE) == tmp_path / "step-10"


def test_a_model_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path)
    other = tiny_model("llama")
    with pytest.raises(CheckpointError, match=r"step-7.*missing|unknown"):
        load_checkpoint(tmp_path / "step-7", other, build_optimizer(other, learning_rate=1e-2))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        save(tmp_path, step=step)
    retain(tmp_path, keep=2, step=20)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-10", "step-20"]


def test_retention_keeps_what_was_saved_just_now_and_no_damaged_later_one(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        save(tmp_path, step=step)
    retain(tmp_path, keep=2, step=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-1", "step-2"]


def test_a_failed_save_leaves_the_old_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, step=5)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("factorlm.train.checkpoint.save_file", full_disk)
    with pytest.raises(StorageError, match="step-7"):
        save(tmp_path, step=7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]

"""``load``: local first, safetensors only, never a random weight, never outside the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from factorlm.errors import CheckpointError
from factorlm.hf import build_causal_lm, load, model_folder
from factorlm.layers import LowRankConfig
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids, tiny_model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(tiny_input_ids()).logits


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_causal_lm(TINY_CONFIGS["starcoder2"](), LowRankConfig(rank=4)).eval()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    return tmp_path / "saved"


def test_a_folder(model: PreTrainedModel, folder: Path) -> None:
    loaded = load(folder)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(load(str(folder))), logits(model))


def test_a_sharded_folder(model: PreTrainedModel, sharded: Path) -> None:
    assert torch.equal(logits(load(sharded)), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma2"])
def test_a_dense_model(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(dense))


def test_dtype_and_attention(folder: Path) -> None:
    loaded = load(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    loaded.save_pretrained(folder.parent / "narrow")
    assert load(folder.parent / "narrow").dtype == torch.bfloat16


def test_a_run_gives_its_best_model_then_its_last(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json here nor in model-best or model"):
        load(run)
    shutil.copytree(folder, run / "model")
    assert model_folder(run) == run / "model"
    shutil.copytree(folder, run / "model-best")
    assert model_folder(run) == run / "model-best"
    assert load(run).config.model_type == "starcoder2"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.c_fc.U"), "c_fc.U: missing from the checkpoint"),
        (lambda w: w.pop("model.layers.0.self_attn.q_proj.weight"), "missing keys: .*q_proj"),
        (lambda w: w.pop("model.norm.weight"), "missing keys: model.norm.weight"),
        (lambda w: w.pop("model.embed_tokens.weight"), "missing keys"),
        (lambda w: w.update(extra=torch.zeros(3)), "unexpected keys: extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(7)}),
            r"(mismatched keys: .*model\.norm\.weight)|(model\.norm\.weight: of another shape)",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.c_fc.U": torch.zeros(7, 7)}),
            r"c_fc\.U: .*of another shape",
        ),
    ],
)
def test_no_weight_is_ever_made_up(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_dense_config_with_structured_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing keys"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_cut_file(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=str(folder)):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "nothing"}', '"llama"'])
def test_a_broken_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        load(folder)


def test_pickled_weights_are_named_and_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin' may run code when read"):
        load(folder)


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


class TestShardIndex:
    @pytest.mark.parametrize("where", ["../outside.safetensors", "{root}/outside.safetensors"])
    def test_names_outside_the_folder(self, where: str, sharded: Path) -> None:
        outside = sharded.parent / "outside.safetensors"
        save_file({"model.norm.weight": torch.ones(32)}, outside)
        name = where.format(root=sharded.parent)
        rewrite_index(sharded, lambda weights: weights.update({"model.norm.weight": name}))
        with pytest.raises(CheckpointError, match="not the plain name of a safetensors file"):
            load(sharded)

    def test_a_link_out_of_the_folder(self, sharded: Path) -> None:
        shard = next(iter(sorted(sharded.glob("*.safetensors"))))
        shutil.move(shard, sharded.parent / shard.name)
        shard.symlink_to(sharded.parent / shard.name)
        with pytest.raises(CheckpointError, match=f"{shard.name}: links to .*, outside of"):
            load(sharded)

    def test_a_link_within_the_folder(self, sharded: Path, model: PreTrainedModel) -> None:
        shard = next(iter(sorted(sharded.glob("*.safetensors"))))
        store = sharded / "store"
        store.mkdir()
        shutil.move(shard, store / shard.name)
        shard.symlink_to(store / shard.name)
        assert torch.equal(logits(load(sharded)), logits(model))

    def test_a_shard_that_is_not_there(self, sharded: Path) -> None:
        shard = next(iter(sorted(sharded.glob("*.safetensors"))))
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"'{shard.name}' is not in the folder"):
            load(sharded)

    def test_pickles_in_the_index(self, sharded: Path) -> None:
        rewrite_index(sharded, lambda weights: weights.update({"model.norm.weight": "x.bin"}))
        with pytest.raises(CheckpointError, match=r"'x\.bin' is not the plain name"):
            load(sharded)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
    def test_a_broken_index(self, text: str, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="index"):
            load(sharded)


def test_code_beside_the_weights_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "canary_bird", "auto_map": {"AutoConfig": "canary.CanaryConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "canary.py").write_text(f"open({str(folder / 'sang')!r}, 'w')")
    with pytest.raises(CheckpointError):
        load(folder)
    assert not (folder / "sang").exists()


def test_kernels_from_the_hub_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for change in ({"attn_implementation": "a/b"}, {"text": {"attn_implementation": "a/b:c"}}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=r"attn_implementation='a/b.*from the Hub"):
            load(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    """transformers would load the base model that it names, wherever that is."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: an adapter"):
        load(folder)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: no such folder".replace("./", "")):
        load(name)


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="someone/something: no such folder, and not"):
        load("someone/something")


def test_a_hub_id_in_the_cache(
    model: PreTrainedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds links into a store of blobs beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(snapshot))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load("a/b")), logits(model))

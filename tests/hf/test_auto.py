"""Plain ``from_pretrained`` of structured models: the traps of transformers' quantizer hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from factorlm.errors import CheckpointError
from factorlm.hf import FactorlmConfig, build_causal_lm, load, register
from factorlm.layers import (
    STRUCTURES,
    Factor,
    LowRankConfig,
    StructureConfig,
    StructuredLinear,
    register_structure,
)
from factorlm.surgery import QUANT_METHOD, densify_, factorize_
from factorlm.testing.models import TINY_CONFIGS, tiny_input_ids, tiny_model

FAMILIES = [family for family in TINY_CONFIGS if family != "mixtral"]
LOW_RANK = LowRankConfig(rank=4)


def build(family: str, **fields: Any) -> PreTrainedModel:
    return build_causal_lm(TINY_CONFIGS[family](), LOW_RANK, **fields).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(tiny_input_ids()).logits


def run_python(script: str, *arguments: str) -> str:
    """Run a script in a new process and return what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_equal(family: str, tmp_path: Path) -> None:
    model = build(family)
    expected = logits(model)
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(model), expected)
        assert type(model.config.quantization_config) is dict
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("first", "second")
    )
    assert first == second


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_every_structure_makes_the_round_trip(kind: str, tmp_path: Path) -> None:
    structure = STRUCTURES[kind]()
    if "num_blocks" in structure.to_dict():
        structure = structure.replace(num_blocks=2)
    model = build_causal_lm(TINY_CONFIGS["starcoder2"](), structure, param_ratio=0.5).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    kinds = {m.config.kind for m in loaded.modules() if isinstance(m, StructuredLinear)}
    assert kinds == {kind}


def test_sharded_bf16_and_tied(tmp_path: Path) -> None:
    model = build("starcoder2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["starcoder2", "gpt2"])
def test_generate_with_and_without_cache(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (
        model.generate(tiny_input_ids(), use_cache=use_cache, **arguments)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_device_map_and_attention_implementation(tmp_path: Path) -> None:
    model = build("llama", attn_implementation="eager")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", attn_implementation="eager"
    )
    assert torch.equal(logits(loaded), logits(model))


def test_layers_that_stay_on_disk(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.model.named_children()}
    places = {f"model.{name}": place for name, place in places.items() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "off"
    )
    assert loaded.model.layers[1].mlp.up_proj.V.is_meta
    assert torch.equal(logits(loaded), logits(model))


def test_a_dense_checkpoint_is_converted_while_it_is_loaded(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path)
    config = FactorlmConfig({"*.mlp.*": LowRankConfig(rank=32).to_target()})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)
    assert len(model.config.quantization_config["targets"]) == 9
    model.save_pretrained(tmp_path / "structured")
    assert torch.equal(logits(load(tmp_path / "structured")), logits(model))


def test_dequantize_is_densify(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()


@pytest.mark.parametrize("family", ["gpt2", "falcon", "phi3", "qwen2_moe"])
def test_the_dense_export_is_the_familys_own_checkpoint(family: str, tmp_path: Path) -> None:
    model = build(family)
    densify_(model)
    model.save_pretrained(tmp_path / "ours")
    tiny_model(family).save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in stock.items()
    }
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_densify_after_loading_leaves_no_trace(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    densify_(model)
    with pytest.raises(ValueError, match="need to first quantize"):
        model.dequantize()


class TestTraps:
    """The nine of the prototype, in its order."""

    def test_1_without_the_import_plain_loading_draws_random_weights(self, tmp_path: Path) -> None:
        """So ``load`` exists, and a dense export that needs none of our code."""
        model = build("llama")
        expected = logits(model)
        model.save_pretrained(tmp_path / "structured")
        densify_(model)
        model.save_pretrained(tmp_path / "dense")
        save_file({"ids": tiny_input_ids(), "logits": expected}, tmp_path / "expected.safetensors")
        script = """
            import sys
            sys.modules["factorlm"] = None  # cannot be imported here
            import torch
            from safetensors.torch import load_file
            from transformers import AutoModelForCausalLM
            folder = sys.argv[1]
            torch.set_num_threads(1)
            expected = load_file(f"{folder}/expected.safetensors")
            dense, info = AutoModelForCausalLM.from_pretrained(
                f"{folder}/dense", output_loading_info=True)
            assert not any(info.values()), info
            with torch.no_grad():
                difference = dense(expected["ids"]).logits - expected["logits"]
            print(float(difference.abs().max()))
            _, info = AutoModelForCausalLM.from_pretrained(
                f"{folder}/structured", output_loading_info=True)
            print(len(info["missing_keys"]))
        """
        difference, missing = run_python(script, str(tmp_path)).split()
        assert float(difference) < 1e-6
        assert int(missing) == 6

    def test_2_a_loaded_model_counts_as_trainable_full_precision(self, tmp_path: Path) -> None:
        build("llama").save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.is_quantized is False
        assert model.hf_quantizer.is_trainable
        assert model.hf_quantizer.is_qat_trainable
        assert model.hf_quantizer.is_compileable
        assert model.half().float().dtype == torch.float32

    def test_3_buffers_that_no_file_holds_are_computed(
        self, tmp_path: Path, shifted: type[StructureConfig]
    ) -> None:
        model = build_causal_lm(TINY_CONFIGS["llama"](), shifted()).eval()
        model.save_pretrained(tmp_path)
        assert not any("order" in key for key in load_file(tmp_path / "model.safetensors"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        order = loaded.model.layers[1].mlp.up_proj.get_buffer("order")
        assert torch.equal(order, torch.arange(32).roll(1))
        rotary = loaded.model.rotary_emb.inv_freq
        assert torch.equal(rotary, model.model.rotary_emb.inv_freq)

    @pytest.mark.parametrize("name", ["U", "V"])
    def test_4_a_missing_factor_is_an_error(self, name: str, tmp_path: Path) -> None:
        build("llama").save_pretrained(tmp_path)
        key = f"model.layers.1.mlp.up_proj.{name}"
        edit_weights(tmp_path, lambda weights: weights.pop(key))
        with pytest.raises(CheckpointError, match=rf"up_proj\.{name}: missing from the checkpoint"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "bloom"])
    def test_5_families_that_read_weight_while_loading(self, family: str, tmp_path: Path) -> None:
        build(family).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
        assert all(torch.equal(layer.weight, layer.to_dense()) for layer in layers)

    @pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
    def test_6_names_resolve_with_and_without_the_prefix(self, family: str, tmp_path: Path) -> None:
        model = build(family)
        hidden = model.base_model(tiny_input_ids()).last_hidden_state
        model.save_pretrained(tmp_path / "whole")
        base = AutoModel.from_pretrained(tmp_path / "whole")
        assert torch.equal(base(tiny_input_ids()).last_hidden_state, hidden)
        base.save_pretrained(tmp_path / "base")
        again = AutoModel.from_pretrained(tmp_path / "base")
        assert torch.equal(again(tiny_input_ids()).last_hidden_state, hidden)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(whole.base_model(tiny_input_ids()).last_hidden_state, hidden)

    def test_7_from_config_builds_dense_and_its_checkpoint_does_not_load(
        self, tmp_path: Path
    ) -> None:
        dense = AutoModelForCausalLM.from_config(build("llama", device="meta").config)
        assert not any(isinstance(module, StructuredLinear) for module in dense.modules())
        dense.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="missing from the checkpoint"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_8_other_heads_load(self, tmp_path: Path) -> None:
        """Adapters on attention and heads of other tasks find what they expect."""
        model = build("llama")
        model.save_pretrained(tmp_path)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        for layer, other in zip(model.model.layers, classifier.model.layers, strict=True):
            assert str(layer.mlp) == str(other.mlp)
            assert torch.equal(layer.mlp.up_proj.weight, other.mlp.up_proj.weight)

    def test_9_the_hf_trainer_trains_saves_and_reloads(self, tmp_path: Path) -> None:
        """Its autocast stays on the model's ``forward`` until it is unwrapped."""
        from transformers import Trainer, TrainingArguments

        build("starcoder2").save_pretrained(tmp_path / "start")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        rows = [{"input_ids": ids, "labels": ids} for ids in tiny_input_ids(batch=16)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            learning_rate=1e-2,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        for name, parameter in model.named_parameters():
            if name.endswith((".U", ".V")):
                assert not torch.equal(parameter, before[name])
        trainer.save_model(str(tmp_path / "end"))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
        unwrapped = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        assert torch.equal(logits(reloaded), logits(unwrapped))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def shifted() -> Iterator[type[StructureConfig]]:
    """A structure that computes with a table that is not saved."""

    class ShiftedConfig(StructureConfig):
        def factors(self, in_features: int, out_features: int) -> tuple[Factor, ...]:
            return (Factor("W", (out_features, in_features)),)

        def to_dense_flops(self, in_features: int, out_features: int) -> int:
            return 0

        def for_param_ratio(self, *sizes: Any, **options: Any) -> Self:
            return self

    @register_structure("shifted", ShiftedConfig)
    class ShiftedLinear(StructuredLinear):
        def __init__(
            self, config: StructureConfig, in_features: int, out_features: int, **options: Any
        ) -> None:
            super().__init__(config, in_features, out_features, **options)
            order = torch.arange(in_features, device=options["device"]).roll(1)
            self.register_buffer("order", order, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x[..., self.order], self.W, self.bias)

        def to_dense(self) -> Tensor:
            return self.W[:, self.order.argsort()]

        def nearest_factors(self, weight: Tensor) -> tuple[Tensor, ...]:
            return (weight[:, self.order],)

        def draw_factors(self, std: Any, generator: Any) -> tuple[Tensor, ...]:
            return (torch.randn(self.W.shape, generator=generator),)

    yield ShiftedConfig
    STRUCTURES._entries.pop("shifted")


class TestBadBlocks:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 99}, "format_version=99"),
            ({"guided": True}, "guided=True: a checkpoint of self-guided training"),
            ({"guide": True}, "unknown key 'guide'"),
            (
                {"targets": {"model.layers.9.mlp.up_proj": LOW_RANK.to_target()}},
                "matches no linear",
            ),
            ({"targets": {"*": {"structure": "nothing"}}}, "unknown structure 'nothing'"),
        ],
    )
    def test_are_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        model = build("llama")
        model.config.quantization_config = model.config.quantization_config | change
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_register_twice_and_one_name() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    register()
    register()
    assert AUTO_QUANTIZER_MAPPING[QUANT_METHOD].__name__ == "FactorlmQuantizer"


def test_a_new_process_that_only_imported_factorlm(tmp_path: Path) -> None:
    """Before transformers, after it, and with torch not loaded by the import itself."""
    models = {family: build(family) for family in ("gpt2", "llama", "starcoder2")}
    expected = {"ids": tiny_input_ids()}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family, max_shard_size="30KB")
        expected[family] = logits(model)
    save_file(expected, tmp_path / "expected.safetensors")
    script = """
        import sys
        import factorlm
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        expected = load_file(f"{sys.argv[1]}/expected.safetensors")
        for family in ("gpt2", "llama", "starcoder2"):
            model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{family}")
            with torch.no_grad():
                assert torch.equal(model(expected["ids"]).logits, expected[family]), family
        print("equal")
    """
    assert run_python(script, str(tmp_path)) == "equal\n"


def test_imported_after_transformers(tmp_path: Path) -> None:
    script = """
        import transformers.quantizers.auto as auto
        assert "factorlm" not in auto.AUTO_QUANTIZER_MAPPING
        import factorlm
        assert "factorlm" in auto.AUTO_QUANTIZER_MAPPING
        assert "factorlm" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        print("registered")
    """
    assert run_python(script) == "registered\n"


def test_a_factorized_dense_model_saves_too(tmp_path: Path) -> None:
    """Surgery alone is enough: no method of ours has to be called to save."""
    model = tiny_model("opt")
    factorize_(model, LOW_RANK)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))

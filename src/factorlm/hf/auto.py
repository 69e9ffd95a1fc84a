"""Plain ``from_pretrained`` for structured models, by transformers' custom quantizer hook.

``import factorlm`` arranges that ``register`` runs once transformers' quantizers are loaded. That
is in the middle of transformers' own import, so nothing here imports models at module level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "factorlm"


class FactorlmConfig(QuantizationConfigMixin):
    """The ``quantization_config`` block of a structured model, as transformers passes it around.

    ``from_pretrained(dense, quantization_config=FactorlmConfig({"*.mlp.*": target}))`` converts a
    dense model while it is loaded; a ``target`` is what ``StructureConfig.to_target`` gives.
    """

    def __init__(self, targets: Mapping[str, Any], format_version: int = 1, **other: Any) -> None:
        self.__dict__.update(other)
        self.quant_method = METHOD
        self.format_version = format_version
        self.targets = dict(targets)


class FactorlmQuantizer(HfQuantizer):
    """Puts structured layers into a model before its weights are loaded."""

    quantization_config: FactorlmConfig
    shapes: Mapping[str, Any]
    """Of the model's tensors, before weights are loaded."""

    def is_serializable(self, **kwargs: Any) -> bool:
        """Factors are saved like any weight."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors train like any weight; the HF ``Trainer`` asks."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Asked together with ``is_trainable``."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Structured layers compile without a graph break."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from factorlm.surgery import factorize_, read_block

        if self.pre_quantized:
            structures = read_block(self.quantization_config.to_dict())
            factorize_(model, _named_as_in(model, structures), weights="empty")
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from factorlm.surgery import factorize_, read_block, update_block

        if self.pre_quantized:
            _check_loaded(model, self.shapes)
        else:
            factorize_(model, read_block(self.quantization_config.to_dict()))
        # transformers put its own object in the place of the plain block.
        update_block(model)
        # Structured weights are in full precision: .half(), .float() and training are allowed.
        model.is_quantized = False

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        from factorlm.surgery import densify_

        densify_(model)
        return model


def _named_as_in(model: Any, structures: Any) -> Any:
    """``structures`` with the names that ``model`` has.

    A base model lacks the prefix that the names of a causal LM have, and the other way round.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def here(name: str) -> str:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in names:
                return candidate
        return name

    return type(structures)({here(name): rule for name, rule in structures.rules.items()})


def _check_loaded(model: nn.Module, shapes: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` for tensors of another shape than ``shapes`` and for factors that
    no file held, and compute the buffers that no file holds. What a ``device_map`` leaves on disk
    is on the meta device here, and is looked for in its file by each call.

    Where there is a quantizer, older versions of transformers check no shape, and all leave absent
    tensors as they were allocated: garbage.
    """
    from factorlm.errors import CheckpointError
    from factorlm.layers import StructuredLinear
    from factorlm.surgery import restore_buffers_

    for name, tensor in model.state_dict().items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{name}: of another shape in the checkpoint, {tuple(tensor.shape)} in place of "
                f"{tuple(shapes[name])}"
            )
    for name, module in model.named_modules():
        if not isinstance(module, StructuredLinear):
            continue
        for key, tensor in module.state_dict(keep_vars=True).items():
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"{name}.{key}: missing from the checkpoint, or of another shape in it"
                )
        restore_buffers_(module)


def register() -> None:
    """Make transformers know ``quant_method: factorlm``; calling it again does nothing."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(FactorlmConfig)
        auto.register_quantizer(METHOD)(FactorlmQuantizer)

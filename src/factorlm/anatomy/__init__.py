"""What a Hugging Face causal language model is made of, found from the model itself."""

from factorlm.anatomy.linears import (
    LinearModule,
    dense_bias,
    dense_weight,
    is_linear,
    linear_kind,
    linear_num_params,
    linear_sizes,
)
from factorlm.anatomy.model import (
    Anatomy,
    LinearSite,
    TensorSite,
    anatomy_of,
    decoder_layers,
    module_names,
)

__all__ = [
    "Anatomy",
    "LinearModule",
    "LinearSite",
    "TensorSite",
    "anatomy_of",
    "decoder_layers",
    "dense_bias",
    "dense_weight",
    "is_linear",
    "linear_kind",
    "linear_num_params",
    "linear_sizes",
    "module_names",
]

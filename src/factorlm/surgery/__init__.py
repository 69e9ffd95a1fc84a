"""The verbs that put structured layers into a model and take them out again."""

from factorlm.surgery.block import (
    FORMAT_VERSION,
    QUANT_METHOD,
    read_block,
    read_structure,
    write_block,
)
from factorlm.surgery.guides import (
    attach_guides_,
    detach_guides_,
    guided_layers,
    set_guides_,
)
from factorlm.surgery.report import SwapReport, SwapRow
from factorlm.surgery.swap import (
    densify_,
    factorize_,
    initializer_std,
    replace_everywhere,
    restore_buffers_,
    stock_model,
    update_block,
)
from factorlm.surgery.targets import StructureMap, default_multiple

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "StructureMap",
    "SwapReport",
    "SwapRow",
    "attach_guides_",
    "default_multiple",
    "densify_",
    "detach_guides_",
    "factorize_",
    "guided_layers",
    "initializer_std",
    "read_block",
    "read_structure",
    "replace_everywhere",
    "restore_buffers_",
    "set_guides_",
    "stock_model",
    "update_block",
    "write_block",
]

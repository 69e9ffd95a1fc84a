"""What is asked before a kernel of our own is used in the place of PyTorch's."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

MAX_DIFFERENCE = 0.02
"""Between a kernel's result and PyTorch's, relative, in norm: above rounding in any dtype (TF32 in
the matmuls included), and far below any mistake."""


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported. CUDA builds of PyTorch bring it along."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖, in float32."""
    wanted = wanted.float()
    difference = torch.linalg.vector_norm(found.float() - wanted)
    return float(difference / torch.linalg.vector_norm(wanted).clamp(min=1e-30))

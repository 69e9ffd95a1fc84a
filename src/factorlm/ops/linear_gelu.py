"""The last product of an FFN's first layer together with its GELU, where a kernel takes both."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from factorlm.ops.autocast import matmul_dtype
from factorlm.ops.kernels import MAX_DIFFERENCE, has_triton, relative_difference
from factorlm.ops.observed import is_observed

DTYPES = (torch.bfloat16, torch.float16)
MIN_TILES = 256
"""About two for each processor: with fewer some processors have nothing to do."""
TILE_TOKENS, TILE_OUTPUTS = 128, 256


def takes_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_groups: int = 1
) -> bool:
    """Whether ``linear_gelu`` has a kernel for tokens ``x`` (*, I) that reach ``weight`` (O, K):
    many, in half precision, without gradients, on a GPU of NVIDIA's from capability 9.0 on. Not
    where it was wrong before, nor in a CUDA graph before it was right."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_observed():
        return False
    width_out, fan_in = weight.shape
    num_tiles = x.numel() // x.shape[-1] // TILE_TOKENS * (width_out // TILE_OUTPUTS)
    return (
        all(_is_plain(one, x) for one in (weight, bias) if one is not None)
        and num_tiles >= MIN_TILES
        and width_out % (num_groups * TILE_OUTPUTS) == 0
        and fan_in % 8 == 0  # rows of the accelerator start at multiples of 16 bytes
        and x.dtype in DTYPES
        and matmul_dtype(x) == x.dtype
        and (bias is None or bias.shape == (width_out,))
        and _has_kernel(x.device)
        and _AGREES.get(_case(x, weight, bias, num_groups), not _is_captured())
    )


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, num_groups: int = 1, by_feature: bool = False
) -> Tensor | None:
    """x (N, G K), or (G K, N) ``by_feature``; weight (O, K), bias (O,) -> (N, O), as
    ``factorlm.ops.triton_linear_gelu.linear_gelu`` says; None where that is not right on this
    device, or where the first values of a case are not finite and say nothing about it.

    To be called where ``takes_linear_gelu``. The first result of a case is compared with
    PyTorch's.
    """
    case = _case(x, weight, bias, num_groups)
    if case not in _AGREES:
        agrees = _agrees(x, weight, bias, num_groups, by_feature)
        if agrees is None:
            return None
        _AGREES[case] = agrees
    return _launch(x, weight, bias, num_groups, by_feature) if _AGREES[case] else None


def _case(x: Tensor, weight: Tensor, bias: Tensor | None, num_groups: int) -> tuple[object, ...]:
    """Groups lie by feature, and one alone does not."""
    return x.device, x.dtype, weight.shape, bias is None, num_groups


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_AGREES: dict[tuple[object, ...], bool] = {}
"""What came out for sizes and devices that were compared."""
COMPARED_TOKENS = 512


def _agrees(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_groups: int, by_feature: bool
) -> bool | None:
    tokens = x[:, :COMPARED_TOKENS] if by_feature else x[:COMPARED_TOKENS]
    wanted = gelu(_product(tokens, weight, bias, num_groups, by_feature))
    if not bool(wanted.to(x.dtype).isfinite().all()):
        return None
    try:
        found = _launch(tokens, weight, bias, num_groups, by_feature)
        relative = relative_difference(found, wanted)
        if relative <= MAX_DIFFERENCE:
            return True
        problem = f"it differs by {relative:.1g} of the result"
    except Exception as error:  # a compiler that is missing, a device that Triton does not know
        problem = f"{type(error).__name__}: {error}"
    sizes = f"{weight.shape[1]} -> {weight.shape[0]} in {x.dtype}"
    warnings.warn(f"GELU of {sizes} does without its Triton kernel: {problem}", stacklevel=2)
    return False


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_groups: int, by_feature: bool
) -> Tensor:
    """Before GELU, in float32."""
    x = x.float().t().unflatten(1, (-1, num_groups)).mT.flatten(1) if by_feature else x.float()
    blocks = weight.float().unflatten(0, (num_groups, -1))
    y = (x.unflatten(1, (num_groups, -1)).transpose(0, 1) @ blocks.mT).transpose(0, 1).flatten(1)
    return y if bias is None else y + bias


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_groups: int, by_feature: bool
) -> Tensor:
    from factorlm.ops import triton_linear_gelu

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return triton_linear_gelu.linear_gelu(
            x, weight, bias, num_groups=num_groups, by_feature=by_feature
        )


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    if torch.version.hip is not None or not has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _is_plain(tensor: Tensor, like: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and (tensor.dtype, tensor.device) == (like.dtype, like.device)
        and tensor.is_contiguous()
        and tensor.data_ptr() % 16 == 0
    )

"""low_rank: y = U(Vx) + b."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.ops.autocast import matmul_dtype
from factorlm.ops.kernels import MAX_DIFFERENCE, has_triton, relative_difference
from factorlm.ops.linear_gelu import linear_gelu, takes_linear_gelu
from factorlm.ops.observed import is_observed

FEW_TOKENS = 16
"""Up to here a GPU computes both products in one launch, if V and U together hold no more than"""
MAX_BYTES = 2**25
"""so many. Beyond, two matmuls were faster before the kernel fetched early (reports/speed)."""
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def low_rank(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, I), V (R, I), U (O, R), bias (O,) -> (*, O). arXiv 2407.09835, section 2.

    One launch on a GPU, if Triton is there, for few tokens without gradients (``fits_one_launch``).
    """
    if torch.compiler.is_compiling() or not (_has_kernel(x) and fits_one_launch(x, V, U, bias)):
        return linear(linear(x, V), U, bias)
    y = _one_launch(x.view(-1, x.shape[-1]), V, U, bias)
    return y.view(*x.shape[:-1], U.shape[0])


def low_rank_gelu(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """gelu(``low_rank``), x (*, I) -> (*, O), with GELU in its second product; None where no kernel
    does that."""
    if not takes_linear_gelu(x, U, bias):
        return None
    y = linear_gelu(linear(x.reshape(-1, x.shape[-1]), V), U, bias)
    return None if y is None else y.view(*x.shape[:-1], U.shape[0])


def low_rank_dense(V: Tensor, U: Tensor) -> Tensor:
    """The dense weight U V, (O, I)."""
    return U @ V


def expects_one_launch(
    device: torch.device, dtype: torch.dtype, num_tokens: int, num_weights: int
) -> bool:
    """Whether a call without gradients takes one launch, as far as these tell; ``num_weights`` are
    R (I + O)."""
    few = num_tokens <= FEW_TOKENS and num_weights * dtype.itemsize <= MAX_BYTES
    return few and dtype in FUSED_DTYPES and has_kernel(device)


def fits_one_launch(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> bool:
    """Whether one launch gives what ``low_rank`` has to give: no gradients, no cast by autocast,
    and up to ``FEW_TOKENS`` tokens in plain contiguous tensors of one dtype, V and U within
    ``MAX_BYTES``."""
    if torch.is_grad_enabled() or is_observed():
        return False
    tensors = (x, V, U) if bias is None else (x, V, U, bias)
    return (
        all(_is_plain(tensor, x) for tensor in tensors)
        and 0 < x.numel() <= FEW_TOKENS * x.shape[-1]
        and matmul_dtype(x) == x.dtype
        and x.dtype in FUSED_DTYPES
        and V.nbytes + U.nbytes <= MAX_BYTES
        and V.shape == (U.shape[-1], x.shape[-1])
        and (bias is None or bias.shape == U.shape[:1])
    )


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether ``device`` runs the kernel: one of NVIDIA's with bfloat16, where Triton is."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and has_triton()


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and has_kernel(x.device)


def _is_plain(tensor: Tensor, like: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == like.dtype
        and tensor.device == like.device
        and tensor.is_contiguous()
        and tensor.data_ptr() % 16 == 0
    )


_AGREES: dict[tuple[object, ...], bool] = {}
"""What came out for sizes and devices where one launch was compared with two matmuls."""


def _one_launch(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, I) -> (N, O), by the kernel, if its first result for such sizes is right.

    The first call also compiles, which a CUDA graph cannot take: there, what was not called before
    are two matmuls.
    """
    from factorlm.ops.triton_low_rank import num_parts_of

    can_chain = _can_chain(x.device, V, U)
    case = (x.device, x.dtype, V.shape, U.shape, bias is None, num_parts_of(x, V), can_chain)
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    agrees = _AGREES.get(case)
    if agrees:
        return _fused(x, V, U, bias, chained=captured and can_chain)
    y = linear(linear(x, V), U, bias)
    if agrees is None and not captured and bool(y.isfinite().all()):
        found = _near(y, x, V, U, bias)
        _AGREES[case] = found is not None
        return y if found is None else found
    return y


def _can_chain(device: torch.device, *factors: Tensor) -> bool:
    """Whether the launch may start before the kernel ahead of it has ended: the device can, and the
    factors are parameters, which no kernel of a graph computes."""
    are_parameters = all(isinstance(factor, nn.Parameter) for factor in factors)
    return are_parameters and _starts_early(device)


@functools.cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel can start on ``device`` before the one ahead of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _fused(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, *, chained: bool = False
) -> Tensor:
    from factorlm.ops.triton_low_rank import fused_low_rank

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return fused_low_rank(x, V, U, bias, chained=chained)


def _near(y: Tensor, x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None) -> Tensor | None:
    """What the kernel gives, in the form that a graph takes too, if that is ``y`` up to rounding;
    else None, and a warning."""
    try:
        for chained in {False, _can_chain(x.device, V, U)}:  # one is compared before the next
            found = _fused(x, V, U, bias, chained=chained)
            relative = relative_difference(found, y)
            if not relative <= MAX_DIFFERENCE:
                break
        else:
            return found
        problem = f"it differs by {relative:.1g} of the result"
    except Exception as error:  # a compiler that is missing, a device that Triton does not know
        problem = f"{type(error).__name__}: {error}"
    sizes = f"{V.shape[1]} -> {V.shape[0]} -> {U.shape[0]} in {x.dtype}"
    warnings.warn(f"low_rank {sizes} does without its Triton kernel: {problem}", stacklevel=2)
    return None

"""y = gelu(x Wᵀ + b) for many tokens: a Triton kernel, for NVIDIA's GPUs from capability 9.0 on.

GELU alone reads and writes all of y once more, which costs a structured FFN a seventh of its time
(reports/speed). Here it is computed where a tile of y is, before that is stored. W may be block-
diagonal, and x may lie by features, with the values of a group in every G-th row, as block_shuffle
leaves it: so its second product copies nothing, and adds its bias for nothing.

Tiles are fetched and stored by the tensor memory accelerator, which fills with zeros what is
outside of a matrix and leaves out what would be stored there. As many programs as there are
processors take one tile after the other, so that a program fetches the next one while it stores.

Letters: N = tokens, G = groups, K = features of a group, O = out_features.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
"""Tokens, outputs and features of a tile: with these stages the fastest of nine on an H100."""
NUM_STAGES, NUM_WARPS = 4, 8
TILES_IN_A_ROW = 8
"""Tiles of tokens that are taken for one tile of outputs, so that W is found in the cache."""


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, num_groups: int = 1, by_feature: bool = False
) -> Tensor:
    """x (N, G K), or (G K, N) ``by_feature``; weight (O, K), bias (O,) -> (N, O).

    Outputs o of group g = o div (O/G) are gelu(x_g weight[o] + bias[o]). x_g are columns g K to
    g K + K; ``by_feature`` rows g, g + G, ... . bfloat16 or float16, on the current device, the
    last dimension dense, O/G a multiple of ``BLOCK_N``. Sums and GELU are in float32. Not seen by
    autograd.
    """
    width_out, fan_in = weight.shape
    if by_feature:
        num_tokens, row = x.shape[1], x.stride(0)
        x = x.as_strided((fan_in, num_groups * row), (num_groups * row, 1))
        tile = [BLOCK_K, BLOCK_M]
    else:
        num_tokens, row = x.shape[0], fan_in
        tile = [BLOCK_M, BLOCK_K]
    y = x.new_empty(num_tokens, width_out)
    describe = TensorDescriptor.from_tensor
    programs = _num_processors(x.device)
    _kernel[(programs,)](
        describe(x, tile),
        describe(weight, [BLOCK_N, BLOCK_K]),
        describe(y, [BLOCK_M, BLOCK_N // 2]),
        bias,
        num_tokens,
        width_out // num_groups,
        fan_in,
        row,
        num_groups,
        by_feature,
        *(BLOCK_M, BLOCK_N, BLOCK_K, TILES_IN_A_ROW, programs),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return y


@triton.jit(do_not_specialize=["num_tokens", "row"])
def _kernel(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    y: tl.tensor_descriptor,
    bias: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,  # O/G
    fan_in: tl.tensor,  # K
    row: tl.tensor,  # from the values of one group to those of the next
    GROUPS: tl.constexpr,
    BY_FEATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_A_ROW: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    down, across = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across * GROUPS, PROGRAMS, flatten=True):
        group, place = tile // (down * across), tile % (down * across)
        first = place // (IN_A_ROW * across) * IN_A_ROW
        rows, place = min(down - first, IN_A_ROW), place % (IN_A_ROW * across)
        m = (first + place % rows) * BLOCK_M
        n = group * width + place // rows * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(fan_in, BLOCK_K)):
            right = weight.load([n, k * BLOCK_K])
            if BY_FEATURE:
                left = x.load([k * BLOCK_K, group * row + m]).T
            else:
                left = x.load([m, group * row + k * BLOCK_K])
            total = tl.dot(left, right.T, total)
        # One half after the other, which takes half of the shared memory.
        halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        for half in tl.static_range(2):
            part = tl.split(halves)[half]
            at = n + half * (BLOCK_N // 2)
            if bias is not None:
                part += tl.load(bias + at + tl.arange(0, BLOCK_N // 2)).to(tl.float32)[None, :]
            y.store([m, at], _gelu(part).to(y.dtype))


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    """x Φ(x) within 1e-4: Φ - 1/2 up to 4.5 by an odd polynomial, fitted for the least largest
    error of this product, 0 or 1 beyond. ``tl.erf`` takes twice as long, which is not hidden."""
    z = tl.minimum(tl.maximum(x, -4.5), 4.5)
    t = z * z
    p = 1.18855653e-12 * t - 8.92440447e-11
    p = p * t + 1.79264634e-09
    p = p * t + 3.86349283e-08
    p = p * t - 2.74040258e-06
    p = p * t + 6.64563987e-05
    p = p * t - 0.000958570588
    p = p * t + 0.00934945074
    p = p * t - 0.0656403116
    p = p * t + 0.398539782
    return x * (tl.minimum(tl.maximum(z * p, -0.5), 0.5) + 0.5)


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # in the interpreter: several tiles each

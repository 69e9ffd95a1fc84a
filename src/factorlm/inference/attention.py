"""Attention of one new token over a cache, on a CPU and in half precision.

There ``scaled_dot_product_attention`` takes up to ten times what two batched products take
(reports/speed/decode_attention.jsonl).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "factorlm_sdpa"
"""Hugging Face's name of it (``attn_implementation``)."""
FEWEST_PRODUCTS = 2**17
"""Of query and key values, B·H·L·D: fewer are left to SDPA, which is one call, unless a compiler
saves the calls."""
MOST_VALUES = 2**23
"""Keys of more values are left to SDPA: the products copy those that are not contiguous."""


def use_decode_attention(model: PreTrainedModel) -> None:
    """Let ``model``, in place, attend to one token at a time with ``attend``, if it is on the CPU
    and attends with ``sdpa``; everything else it computes as before."""
    uses_sdpa = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    if model.device.type == "cpu" and uses_sdpa:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention: query (B, H, N, D), key and value (B, heads, L, D), and a mask that
    broadcasts to (B, H, N, L), True or 0 where it attends. Returns ((B, N, H, D), None).

    One query without a gradient is multiplied here; all else goes to SDPA.
    """
    if _is_served(query, key, attention_mask, kwargs):
        return attend_one(query, key, value, attention_mask, scaling), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return found


def _is_served(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and (query.numel() * key.shape[2] >= FEWEST_PRODUCTS or torch.compiler.is_compiling())
        and key.numel() <= MOST_VALUES
        and not torch.is_grad_enabled()
        and (mask is None or mask.shape[1] == 1)
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "cache"))
    )


def attend_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """(B, 1, H, D) of query (B, H, 1, D), key and value (B, heads, L, D). Heads that share keys are
    columns of one product, and keys are read as they lie, row by row."""
    batch, heads, _, width = query.shape
    columns = query.reshape(batch, key.shape[1], -1, width).mT
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (key @ columns).mT.to(wide) * (width**-0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    found = scores.softmax(-1).to(value.dtype) @ value
    return found.view(batch, 1, heads, value.shape[-1])

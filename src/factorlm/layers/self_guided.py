"""Self-guided training: a dense guide beside a structured layer (arXiv 2407.09835, section 4).

o = α W x + (1 - α) S x + b, with S the structured map and W a trainable dense weight that starts
equal to it. Who trains decides α and when the guide goes; nothing here counts steps.

Letters: I = in_features, O = out_features, N = tokens.
"""

from __future__ import annotations

from typing import Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from factorlm.config import check
from factorlm.layers.base import StructuredLinear
from factorlm.layers.config import StructureConfig
from factorlm.layers.wrapper import StructuredWrapper

GuideForm = Literal["auto", "merged", "two_path"]


def merging_pays(
    config: StructureConfig, in_features: int, out_features: int, num_tokens: int
) -> bool:
    """Whether computing S as a dense weight takes fewer FLOPs than running it on ``num_tokens``.

    Forward and backward cost three times either, so the comparison is that of the forward pass:
    ``to_dense_flops`` against ``flops_per_token`` x tokens. For low_rank: N > I O / (I + O).
    """
    structured = num_tokens * config.flops_per_token(in_features, out_features)
    return config.to_dense_flops(in_features, out_features) < structured


@final
class Guide(nn.Module):
    """The dense weight W. A module of its own, so that FSDP2 gathers it in its own forward."""

    weight: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        empty = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty)

    def forward(
        self,
        x: Tensor,  # (*, I)
        alpha: Tensor,  # ()
        bias: Tensor | None,  # (O,)
        *,
        dense: Tensor | None = None,  # (O, I), S as a dense weight
        output: Tensor | None = None,  # (*, O), S x + b
    ) -> Tensor:
        """α W x + (1 - α) S x + b, (*, O), from either ``dense`` or ``output``."""
        if dense is not None:
            alpha = alpha.to(self.weight.dtype)
            merged = torch.lerp(dense.to(self.weight.dtype), self.weight, alpha)
            return linear(x, merged, bias)
        assert output is not None
        guided = linear(x, self.weight, bias)
        return torch.lerp(output, guided, alpha.to(guided.dtype))


@final
class SelfGuidedLinear(StructuredWrapper):
    """``structured`` with a dense guide beside it; see the module's docstring.

    ``form`` says how a guided pass is computed: ``two_path``, both maps on every token;
    ``merged``, one dense matmul with α W + (1 - α) S, exact and cheaper from some hundred tokens
    on; ``auto`` asks ``merging_pays``. In training, ``skipped`` runs ``structured`` alone and
    unscaled (the papers' stochastic variant).

    In state dicts ``structured`` has the names that it has alone (``V``, ``bias``), so that files
    from before, during and after guidance agree; beside them stands ``guide.weight``.
    """

    alpha: Tensor
    skipped: bool

    def __init__(self, structured: StructuredLinear, *, form: GuideForm = "auto") -> None:
        check(form in get_args(GuideForm), f"form={form!r} must be one of {get_args(GuideForm)}")
        super().__init__(structured)
        like: Tensor = getattr(structured, structured.factors[0].name)
        self.form: GuideForm = form
        self.guide = Guide(
            structured.in_features, structured.out_features, device=like.device, dtype=like.dtype
        )
        self.register_buffer("alpha", torch.ones((), device=like.device), persistent=False)
        self.skipped = False
        if not like.is_meta:
            self.start_(structured)
        self.train(structured.training)

    @torch.no_grad()
    def start_(self, structured: StructuredLinear) -> None:
        """Set the guide to the map of ``structured`` and α to 1."""
        self.guide.weight.copy_(structured.weight)
        self.alpha.fill_(1.0)

    def set_alpha(self, alpha: float, *, skipped: bool = False) -> None:
        """Set α in [0, 1], and whether training passes leave the guide out; no device sync."""
        check(0 <= alpha <= 1, f"alpha={alpha} must lie in [0, 1]")
        self.alpha.fill_(alpha)
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""
        structured = self.structured
        if self.skipped and self.training:
            return structured(x)
        # One row a token: of more dimensions `linear` returns a view, which FSDP2 warns about.
        tokens = x.reshape(-1, structured.in_features)
        return self._mixed(tokens).view(*x.shape[:-1], structured.out_features)

    def _mixed(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O), with the guide."""
        structured = self.structured
        if self._merges(len(x)):
            return self.guide(x, self.alpha, structured.bias, dense=structured.to_dense())
        return self.guide(x, self.alpha, structured.bias, output=structured(x))

    def _merges(self, num_tokens: int) -> bool:
        if self.form != "auto":
            return self.form == "merged"
        structured = self.structured
        sizes = (structured.in_features, structured.out_features)
        return merging_pays(structured.config, *sizes, num_tokens)

    def extra_repr(self) -> str:
        """How it is computed."""
        return f"form={self.form}"

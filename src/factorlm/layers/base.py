"""``StructuredLinear``: what ``nn.Linear`` is, for weights that are products of factors.

Letters: I = in_features, O = out_features, R = rank, G = num_blocks, N = tokens, m = min(I, O).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import gelu

from factorlm.config import check
from factorlm.errors import NumericError
from factorlm.layers.config import Factor, StructureConfig
from factorlm.layers.initialization import gaussian, structure_aware_std
from factorlm.layers.projection import wide

Layer = TypeVar("Layer", bound=nn.Module)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast, which would round the products of factors to bf16."""
    kind = "cpu" if device.type == "meta" else device.type  # there is no autocast for meta
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


class StructuredLinear(nn.Module, ABC):
    """y = x Wᵀ + b with W (O, I) a product of factors.

    A concrete class is final, declares the parameters that its config states as ``factors``
    (they are allocated here), and implements the four abstract methods; ``products``,
    ``matrices`` and ``fused_gelu`` are there to be overridden. The battery in
    ``factorlm.testing.contract`` proves a class.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        config: StructureConfig,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config.validate(in_features, out_features)
        self.config = config
        self.in_features = in_features
        self.out_features = out_features
        for factor in self.factors:
            empty = torch.empty(factor.shape, device=device, dtype=dtype)
            self.register_parameter(factor.name, nn.Parameter(empty))
        empty = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.reset_parameters()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O)."""

    @final
    def forward_gelu(self, x: Tensor) -> Tensor:
        """gelu(self(x)), (*, I) -> (*, O), with the exact GELU.

        In one go by ``fused_gelu`` where that is all that a call does: without hooks, and with the
        class's own ``forward``.
        """
        hooked = self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self)
        y = None if hooked else self.fused_gelu(x)
        return gelu(self(x)) if y is None else y

    def fused_gelu(self, x: Tensor) -> Tensor | None:
        """``forward_gelu`` where the last product takes GELU along (``factorlm.ops.linear_gelu``);
        None where none does."""
        return None

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The dense weight, (O, I), differentiable in the factors."""

    @abstractmethod
    def nearest_factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors whose product is nearest to ``weight`` (O, I) in Frobenius norm.

        In order of application, with S^1/2 of the singular values on each side. ``weight`` is
        float32 or wider.
        """

    @abstractmethod
    def draw_factors(
        self, std: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        """The factors as the papers initialise them, in order, drawn on the CPU in float32."""

    def matrices(self) -> tuple[Tensor, ...]:
        """The matrices that ``forward`` multiplies by, one after the other, where it does nothing
        else but add the bias; empty where it does."""
        return ()

    def products(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """The dense weight of ``factors``, in order of application, as a batch of small products.

        ``left`` (..., o, r) and ``right`` (..., r, i): every entry of W is in ``left @ right``
        exactly once, in any place. Monitors read norms of W and of its changes from Gram matrices
        of size r (``factorlm.layers.spectrum``). Here every row of ``to_dense`` is a product, with
        r = 1; override it where W never has to exist.
        """
        names = [f"layer.{factor.name}" for factor in self.factors]
        dense = functional_call(_Dense(self), dict(zip(names, factors, strict=True)), ())
        return dense.new_ones(dense.shape[0], 1, 1), dense.unsqueeze(1)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of this layer, in order of application."""
        return self.config.factors(self.in_features, self.out_features)

    @final
    def reset_parameters(
        self, *, std: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw the factors anew and zero the bias; on the meta device, nothing.

        Drawn on the CPU in float32, so the values are equal on every device. ``std`` is the
        standard deviation of the dense weight whose structure is drawn (dense and low_rank with
        ``init="paper"`` only); None means ``nn.Linear``'s 1/sqrt(3 I).
        """
        if self._device().type == "meta":
            return
        with _exact(torch.device("cpu")):
            if self.config.init == "structure_aware":
                values = tuple(
                    gaussian(factor.shape, structure_aware_std(factor), generator)
                    for factor in self.factors
                )
            else:
                values = self.draw_factors(std, generator)
            self._copy_factors(values)
            if self.bias is not None:
                self.bias.zero_()

    @final
    def project_(self, weight: Tensor) -> Self:
        """Set the factors to the best approximation of ``weight`` (O, I) in Frobenius norm.

        Computed in float32 or wider, with balanced factors. The bias is left as it is. Raises
        ``NumericError`` for a weight that is not finite.
        """
        expected = (self.out_features, self.in_features)
        check(
            tuple(weight.shape) == expected,
            f"weight has shape {tuple(weight.shape)}, not (out_features, in_features)={expected}",
        )
        check_finite("weight", weight)
        with _exact(weight.device):
            self._copy_factors(self.nearest_factors(wide(weight)))
        return self

    def _copy_factors(self, values: Iterable[Tensor]) -> None:
        for factor, value in zip(self.factors, values, strict=True):
            self.get_parameter(factor.name).copy_(value)

    def _device(self) -> torch.device:
        factor: Tensor = getattr(self, self.factors[0].name)  # parametrised, it is no parameter
        return factor.device

    @property
    def weight(self) -> Tensor:
        """A detached dense weight, (O, I), for code that expects ``nn.Linear.weight`` to read.

        Read only. Flagged as initialised for transformers' ``_init_weights``.
        """
        with _exact(self._device()):
            dense = self.to_dense().detach()
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        return dense

    @staticmethod
    def from_linear(linear: nn.Linear, config: StructureConfig) -> StructuredLinear:
        """The best approximation of ``linear`` by ``config``: same device, dtype, mode, and
        trainable where ``linear`` is."""
        like = linear.weight
        sizes = (linear.in_features, linear.out_features)
        # Built on the meta device, since an initialisation that is overwritten costs an SVD.
        layer = config.build(*sizes, bias=linear.bias is not None, device="meta", dtype=like.dtype)
        layer.to_empty(device=like.device).project_(like)
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return alike_(layer, linear)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same weight, bias, device, dtype and mode, trainable where
        a factor is; its bias, where the bias is."""
        dense = self.weight
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=dense.device,
            dtype=dense.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(dense)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return alike_(linear, self)

    def relative_error(self, weight: Tensor) -> float:
        """‖W − to_dense()‖ / ‖W‖ in Frobenius norm, in float64; 0 where both are zero."""
        with _exact(weight.device):
            target = weight.double()
            error = torch.linalg.norm(target - self.weight.double())
            return float(error / torch.linalg.norm(target)) if error else 0.0

    def extra_repr(self) -> str:
        """Sizes and the config's own fields."""
        fields = [
            f"{f.name}={getattr(self.config, f.name)}" for f in dataclasses.fields(self.config)
        ]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return ", ".join([sizes, f"bias={self.bias is not None}", *fields])


def alike_(new: Layer, old: nn.Module) -> Layer:
    """Give ``new``, which takes the place of the linear layer ``old``, its mode and what is
    trainable of it: weights if one of ``old`` is, the bias if its bias is."""
    weights = [parameter for parameter in old.parameters() if parameter is not old.bias]
    new.train(old.training).requires_grad_(any(weight.requires_grad for weight in weights))
    if isinstance(new.bias, Tensor) and isinstance(old.bias, Tensor):
        new.bias.requires_grad_(old.bias.requires_grad)
    return new


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ``NumericError`` for NaN and infinity: there is no nearest product of factors."""
    if not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise NumericError(f"{name} is not finite: it cannot be approximated by factors")


class _Dense(nn.Module):
    """``to_dense`` as a forward, which ``functional_call`` runs with other factors."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.to_dense()

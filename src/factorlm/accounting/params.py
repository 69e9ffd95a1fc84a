"""Parameters by part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from factorlm.anatomy import Anatomy, anatomy_of


@dataclass(frozen=True)
class ParamCount:
    """Numbers of parameters. The parts do not overlap; a tied head is part of the embedding."""

    embedding: int
    """Tables of tokens and of learned positions."""
    attention: int
    """Weights of the linears that attention holds."""
    ffn: int
    """Weights of the FFN linears, dense or structured, and of experts."""
    head: int
    """Weights of the output head; 0 where it is tied to the embedding."""
    other: int
    """Routers, projections outside the decoder layers, and whatever else a family has."""
    norm: int
    """Norms, their biases included."""
    bias: int
    """Biases of everything but norms."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(dataclasses.astuple(self))

    @property
    def weights(self) -> int:
        """Without biases and norms: how the papers count their s, m and l models."""
        return self.total - self.norm - self.bias

    @property
    def non_embedding(self) -> int:
        """Without the tables of tokens and positions and without the head."""
        return self.total - self.embedding - self.head

    def __str__(self) -> str:
        rows = dataclasses.asdict(self) | {
            "total": self.total,
            "weights only": self.weights,
            "non-embedding": self.non_embedding,
        }
        return "\n".join(f"{name:<14}{value:>16,}" for name, value in rows.items())


def count_params(model: nn.Module) -> ParamCount:
    """Count the parameters of ``model`` by part; one that is shared counts once."""
    anatomy = anatomy_of(model)
    parts = _parts(anatomy)
    counts = {field.name: 0 for field in dataclasses.fields(ParamCount)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if anatomy.input_embedding is not None:
        table = model.get_submodule(anatomy.input_embedding)
        names |= {id(p): f"{anatomy.input_embedding}.{n}" for n, p in table.named_parameters()}
    for parameter in model.parameters():
        counts[_part(names[id(parameter)], parts)] += parameter.numel()
    return ParamCount(**counts)


def _parts(anatomy: Anatomy) -> dict[str, str]:
    """Module or parameter name -> part."""
    tables = (anatomy.input_embedding, *anatomy.other_embeddings)
    parts = {name: "embedding" for name in tables if name is not None}
    parts |= {site.name: "attention" for site in anatomy.attention_linears}
    parts |= {site.name: "ffn" for site in anatomy.ffn_linears}
    parts |= {site.name: "ffn" for site in anatomy.experts}
    parts |= dict.fromkeys(anatomy.norms, "norm")
    if anatomy.head is not None:
        parts[anatomy.head] = "head"
    return parts


def _part(name: str, parts: dict[str, str]) -> str:
    """The part of the nearest enclosing module that has one; biases of non-norms apart."""
    owner = name
    while owner and owner not in parts:
        owner = owner.rpartition(".")[0]
    part = parts.get(owner, "other")
    return "bias" if part != "norm" and name.endswith("bias") else part

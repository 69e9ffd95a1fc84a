"""How long a structured layer and its merged copy take, by tokens, and where that is kept.

Letters: I = in_features, O = out_features, N = tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from factorlm.errors import DataError, FactorlmError
from factorlm.layers import MergePolicy, StructureConfig, StructuredLinear
from factorlm.measure import cpu_name
from factorlm.ops.kernels import has_triton
from factorlm.storage import (
    cache_folder,
    read_sealed_json,
    storage_errors,
    write_sealed_json,
)

FORMAT_VERSION = 2
"""Of a cached table; raised when its meaning changes. Since 2, a CPU packs what is timed."""


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """What layers have in common that take the same time."""

    config: StructureConfig
    """Without its ``init``, which costs no time in use."""
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    device_type: str
    device_name: str
    """The processor's or the accelerator's own name."""

    @classmethod
    def of(cls, layer: StructuredLinear) -> Self:
        """The case of ``layer``."""
        like = layer.get_parameter(layer.factors[0].name)
        device = like.device
        return cls(
            config=layer.config.replace(init="paper"),
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=layer.bias is not None,
            dtype=like.dtype,
            device_type=device.type,
            device_name=_device_name(device),
        )

    @property
    def copy_bytes(self) -> int:
        """What a merged copy holds."""
        return self.in_features * self.out_features * self.dtype.itemsize

    @property
    def has_factors(self) -> bool:
        """Whether the dense weight is anything that the layer does not hold already."""
        return self.config.to_dense_flops(self.in_features, self.out_features) > 0

    def key(self) -> dict[str, Any]:
        """Plain JSON of all that a latency depends on, the process's threads and versions too."""
        target = self.config.to_target()
        del target["init"]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.device_type == "cuda":
            values |= {"triton": _triton_version(), "timed": "CUDA graph"}
        return values | {
            "config": target,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_threads": torch.get_num_threads() if self.device_type == "cpu" else None,
            "torch": str(torch.__version__),
            "factorlm": importlib.metadata.version("factorlm"),
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.config.kind} {self.in_features}x{self.out_features} {dtype}"


def _triton_version() -> str | None:
    """Of the compiler of our kernels; None where there is none."""
    return importlib.import_module("triton").__version__ if has_triton() else None


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


@dataclass(frozen=True, kw_only=True)
class TokenLatency:
    """One call with ``num_tokens``, by the factors and by the merged copy."""

    num_tokens: int
    structured_ms: float
    merged_ms: float
    noise_ms: float
    """A difference below this is none."""

    @property
    def merges(self) -> bool:
        """Whether the merged copy is faster by more than noise."""
        return self.merged_ms + self.noise_ms < self.structured_ms


@dataclass(frozen=True)
class LatencyTable:
    """The latencies of one case, by ascending token counts."""

    rows: tuple[TokenLatency, ...]

    @property
    def policy(self) -> MergePolicy:
        """Merged where that is faster by more than noise."""
        return MergePolicy(
            token_counts=tuple(row.num_tokens for row in self.rows),
            merged=tuple(row.merges for row in self.rows),
        )

    def extended_by(self, other: LatencyTable) -> LatencyTable:
        """With the rows of ``other`` beyond its own last one, if the merged copy is faster there.

        A copy that wins at the last count that was measured need not win far beyond it. Factors
        that win there do, since they take fewer FLOPs.
        """
        last = self.rows[-1]
        if not last.merges:
            return self
        beyond = tuple(row for row in other.rows if row.num_tokens > last.num_tokens)
        return LatencyTable(self.rows + beyond)

    def saved_ms_per_token(self, policy: MergePolicy) -> float:
        """What the merged copy saves where ``policy`` takes it, if every token count of the table
        brings as many tokens as any other. So a call of one token weighs most."""
        return sum(
            (row.structured_ms - row.merged_ms) / row.num_tokens
            for row in self.rows
            if policy.merges(row.num_tokens)
        )


def table_path(case: LayerCase) -> Path:
    """The file of ``case`` in the cache: one each, so that no writer loses another's."""
    text = json.dumps(case.key(), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return cache_folder() / "premerge" / f"{digest}.json"


def make_cache_folder() -> None:
    """Make the folder of the tables. Raises ``StorageError`` if it cannot be made."""
    folder = cache_folder() / "premerge"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def save_table(case: LayerCase, table: LatencyTable) -> Path:
    """Write the table of ``case`` into the cache, whole or not at all; its file.

    Raises ``StorageError`` if it cannot be written.
    """
    path = table_path(case)
    make_cache_folder()
    rows = [dataclasses.asdict(row) for row in table.rows]
    write_sealed_json(path, {"format_version": FORMAT_VERSION, "key": case.key(), "rows": rows})
    return path


def cached_table(case: LayerCase) -> LatencyTable | None:
    """What ``save_table`` wrote for ``case`` on this machine with these threads and versions.

    None where there is nothing. A file that is damaged or not ours is left alone, with a warning.
    """
    path = table_path(case)
    if not os.path.lexists(path):
        return None
    try:
        return _read_table(read_sealed_json(path), case)
    except (FactorlmError, OSError) as error:
        warnings.warn(f"{path} is not used: {error}. `factorlm tune` writes it anew.", stacklevel=2)
        return None


def _read_table(body: dict[str, Any], case: LayerCase) -> LatencyTable:
    """Raises ``DataError`` for what ``save_table`` did not write for ``case``."""
    if body.get("format_version") != FORMAT_VERSION or body.get("key") != case.key():
        raise DataError("it is of another format, or of another layer or machine")
    try:
        table = LatencyTable(tuple(TokenLatency(**row) for row in body["rows"]))
        times = [t for r in table.rows for t in (r.structured_ms, r.merged_ms, r.noise_ms)]
        sound = bool(table.policy.token_counts) and all(
            math.isfinite(time) and time >= 0 for time in times
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"its rows cannot be read ({error})") from None
    if not sound:
        raise DataError("its rows are no latencies")
    return table

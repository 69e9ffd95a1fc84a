"""What to prepare: the options of ``factorlm prepare`` as a config."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from factorlm.config import Config, check
from factorlm.data.tokenizer_building import bpe_size

DEFAULT_VAL_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Config):
    """What to prepare, from what, into which folder."""

    sources: tuple[str, ...]
    """Files, folders, globs, ``hf:name[:config][:split]`` or ``python-stdlib``."""
    output: str
    """Folder to write; the same command goes on where it was stopped."""
    tokenizer: str = "bpe:4096"
    """``bytes``, ``bpe:<size>``, a tokenizer folder, or a Hugging Face name."""
    eos_token: str | None = None
    """Ends documents; None takes the one that the tokenizer names."""
    val_fraction: float | None = None
    """Share that validates: of the documents, or the tail of a source that is one document. None
    means 0.1, or 0 with ``val_sources``."""
    val_sources: tuple[str, ...] = ()
    """Sources that validate; all of ``sources`` then trains."""
    weights: tuple[float, ...] = ()
    """How many times an epoch goes over each source; () means once over each."""
    text_column: str = "text"
    """Name of the text in JSON lines, parquet and datasets."""
    workers: int | None = None
    """Processes; None means one a core, up to 16. It changes nothing in the output."""
    shard_tokens: int = 2**26
    """Ids in a shard file."""
    tolerant: bool = False
    """Leave out and count bad records, up to 0.1 % of all; otherwise the first one is an error."""
    seed: int = 0
    """Of the choice of validation documents."""

    def __post_init__(self) -> None:
        for name in ("sources", "val_sources", "weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check(len(self.sources) > 0, "sources: name at least one")
        check(self.output != "", "output: name a folder")
        fraction = self.val_fraction
        check(fraction is None or 0 <= fraction < 1, f"val_fraction={fraction} must be in [0, 1)")
        both = self.val_sources and fraction
        check(not both, f"val_fraction={fraction} and val_sources: give one of them")
        lengths = f"weights: {len(self.weights)} for {len(self.sources)} sources"
        check(len(self.weights) in (0, len(self.sources)), lengths)
        good = all(0 < weight < float("inf") for weight in self.weights)
        check(good, f"weights={list(self.weights)} must be positive numbers")
        check(self.workers is None or self.workers >= 1, f"workers={self.workers} must be >= 1")
        check(self.shard_tokens >= 1, f"shard_tokens={self.shard_tokens} must be >= 1")
        bpe_size(self.tokenizer)

    @property
    def fraction(self) -> Fraction:
        """``val_fraction`` as it is written in decimals, its default filled in."""
        default = 0 if self.val_sources else DEFAULT_VAL_FRACTION
        return Fraction(str(default if self.val_fraction is None else self.val_fraction))

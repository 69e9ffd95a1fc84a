"""A prepared data set and a recipe for a model of some thousands of parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factorlm.data import PrepareConfig, prepare
from factorlm.train import TrainConfig


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words as bytes; 20 kB of text, a tenth for validation."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=5)) for _ in range(50)]
    (folder / "text.txt").write_text(" ".join(chance.choices(words, k=4000)))
    source, output = str(folder / "text.txt"), str(folder / "prepared")
    prepare(PrepareConfig(sources=[source], output=output, tokenizer="bytes", val_fraction=0.1))
    return folder / "prepared"


@pytest.fixture
def tiny_values(data: Path) -> Callable[..., dict[str, Any]]:
    """The plain values of a small structured run; keyword arguments change a section's fields."""

    def values(**sections: Any) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "name": "tiny",
            "model": {
                "preset": "gpt_nano",
                "vocab_size": 257,
                "overrides": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            },
            "structure": {"structure": "low_rank", "rank": 8},
            "guide": {"variant": "none"},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "data": {"path": str(data), "context_length": 16},
            "batch": {"num_sequences": 8, "num_steps": 10},
            "parallel": {"num_threads": 1, "precision": "fp32", "device": "cpu"},
        }
        for name, changes in sections.items():
            nested = isinstance(changes, dict) and name != "structure"
            plain[name] = {**plain.get(name, {}), **changes} if nested else changes
        return plain

    return values


@pytest.fixture
def tiny_config(tiny_values: Callable[..., dict[str, Any]]) -> Callable[..., TrainConfig]:
    """``tiny_values`` as a config."""
    return lambda **sections: TrainConfig.from_dict(tiny_values(**sections))

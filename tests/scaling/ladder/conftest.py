"""A ladder of two families and three sizes over models of some thousands of parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from factorlm.data import PrepareConfig, prepare
from factorlm.scaling.ladder.config import LadderFile, load_ladder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words as bytes, a tenth for validation."""
    folder = tmp_path_factory.mktemp("ladder-data")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=5)) for _ in range(50)]
    (folder / "text.txt").write_text(" ".join(chance.choices(words, k=2000)))
    source, output = str(folder / "text.txt"), str(folder / "prepared")
    prepare(PrepareConfig(sources=[source], output=output, tokenizer="bytes", val_fraction=0.1))
    return folder / "prepared"


def size_sections(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "head_dim": width // 2}
    return {"model": {"overrides": sizes}}


@pytest.fixture
def write_ladder(data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe and a ladder of runs of three steps; keyword arguments change fields."""

    def write(**fields: Any) -> Path:
        recipe = {
            "model": {
                "preset": "gpt_nano",
                "vocab_size": 257,
                "overrides": {
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                },
            },
            "guide": {"variant": "none"},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "data": {"path": str(data), "context_length": 16},
            "batch": {"num_sequences": 8, "num_steps": 3},
            "eval": {"num_tokens": 128, "final_num_tokens": 128},
            "parallel": {"precision": "fp32", "device": "cpu"},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        values: dict[str, Any] = {
            "recipe": "recipe.yaml",
            "sizes": {"a": size_sections(8), "b": size_sections(16), "c": size_sections(24)},
            "families": {
                "dense": {},
                "low_rank": {"structure": {"structure": "low_rank", "param_ratio": 0.5}},
            },
            "tokens": {"rule": "fixed", "num_tokens": 3 * 128},
        }
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(values | fields, sort_keys=False))
        return path

    return write


@pytest.fixture
def ladder(write_ladder: Callable[..., Path]) -> Callable[..., LadderFile]:
    """``write_ladder``, read."""
    return lambda **fields: load_ladder(write_ladder(**fields))

"""The first record of a run that nobody trained."""

from __future__ import annotations

from typing import Any

from factorlm.records import RunRecord


def run_record(name: str, config: dict[str, Any], **changes: Any) -> RunRecord:
    """A run of one parameter and one step, but for ``changes``."""
    values: dict[str, Any] = {
        "environment": {},
        "num_params": 1,
        "num_ffn_params": 1,
        "num_non_embedding_params": 1,
        "forward_flops_per_token": 1.0,
        "training_flops": 1.0,
        "num_steps": 1,
        "tokens_per_step": 1,
    }
    return RunRecord(name=name, config=config, **(values | changes))

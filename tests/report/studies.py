"""Record files of invented ladders whose losses follow a known law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from factorlm.records import EvalRecord, EventRecord, RecordFile, RunRecord, StepRecord

Law = Callable[[float, float, float], float]
"""Parameters, tokens and FLOPs to loss."""
ENTROPY = 1.5
GAMMAS = {"dense": 0.10, "low_rank_32": 0.13}
SCALES = {"dense": 3.0, "low_rank_32": 3.1}
SHARES = {"dense": 1.0, "low_rank_32": 0.6}
"""Of the dense FLOPs."""
CENTER = 1e13
"""FLOPs at which a law is ENTROPY + its SCALE."""


def power_law(family: str) -> Law:
    """The law that the runs of a family follow."""
    return lambda params, tokens, flops: (
        ENTROPY + SCALES[family] * (flops / CENTER) ** -GAMMAS[family]
    )


def write_ladder(
    folder: Path,
    *,
    families: Iterable[str] = ("dense", "low_rank_32"),
    params: Iterable[float] = (3e4, 1e5, 3e5, 1e6, 3e6),
    seeds: int = 2,
    noise: float = 0.002,
    ladder: str = "books",
    rng: int = 0,
) -> Path:
    """Every family at every size, 20 tokens a parameter; sizes are ``w1``, ``w2``, ..."""
    draw = np.random.default_rng(rng)
    for family in families:
        for index, num_params in enumerate(params, start=1):
            tokens = 20 * num_params
            flops = 6 * num_params * tokens * SHARES[family]
            loss = power_law(family)(num_params, tokens, flops)
            for seed in range(seeds):
                labels = {"ladder": ladder, "family": family, "size": f"w{index}", "stage": "main"}
                write_run(
                    folder,
                    f"{family}-w{index}-s{seed}",
                    num_params=num_params,
                    num_tokens=tokens,
                    flops=flops,
                    loss=loss * math.exp(draw.normal(0, noise)),
                    seed=seed,
                    labels=labels,
                )
    return folder


def write_grid(folder: Path, law: Law, *, noise: float = 0.0, family: str = "dense") -> Path:
    """Five sizes on each of four budgets, FLOPs = 6·N·D, executed ones 1.1 times that."""
    draw = np.random.default_rng(0)
    for budget in range(4):
        flops = 1e15 * 10**budget
        for size in range(budget, budget + 5):
            num_params = 5e5 * 3**size
            tokens = flops / (6 * num_params)
            labels = {"ladder": "grid", "family": family, "size": f"w{size}", "stage": "main"}
            write_run(
                folder,
                f"{family}-w{size}-{flops:g}",
                num_params=num_params,
                num_tokens=tokens,
                flops=flops,
                loss=law(num_params, tokens, flops) * math.exp(draw.normal(0, noise)),
                labels=labels,
            )
    return folder


def write_run(
    folder: Path,
    name: str,
    *,
    num_params: float,
    num_tokens: float,
    flops: float,
    loss: float,
    seed: int = 0,
    labels: Mapping[str, str] | None = None,
    executed: bool = True,
    finished: bool = True,
    guided: bool = False,
    last_step: int = 2,
    **config: Any,
) -> Path:
    """A run of two steps whose evaluation at ``last_step`` has ``loss``; 1.1x executed FLOPs."""
    stated = {"name": name, "seed": seed} | config
    run = RunRecord(
        name=name,
        config=stated | ({} if labels is None else {"labels": dict(labels)}),
        environment={"cpu": "Abacus"},
        num_params=round(num_params),
        num_ffn_params=round(num_params / 2),
        num_non_embedding_params=round(num_params / 1.2),
        forward_flops_per_token=flops / num_tokens / 3,
        training_flops=flops,
        num_steps=2,
        tokens_per_step=round(num_tokens / 2),
    )
    file = RecordFile(folder / f"{name.replace('/', '_')}.jsonl")
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.append(run)
    for step in (1, 2):
        step_record = StepRecord(
            step=step,
            num_tokens=round(num_tokens * step / 2),
            loss=5.0 - step,
            learning_rate=1e-3,
            grad_norm=1.0,
            step_ms=10.0,
            model_flops=flops * step / 2,
        )
        spent = 1.1 * flops * step / 2 if executed else None
        file.append(dataclasses.replace(step_record, executed_flops=spent))
    file.append(
        EvalRecord(
            step=last_step,
            num_tokens=round(num_tokens * last_step / 2),
            source="validation",
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            bits_per_byte=None,
            num_eval_tokens=1000,
            seconds=1.0,
            guided=guided,
        )
    )
    if finished:
        file.append(EventRecord(event="finished", step=2))
    return file.path

"""Record files of invented runs and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factorlm.records import (
    LOSS_SPIKE,
    BenchmarkRecord,
    CaseTimes,
    EvalRecord,
    EventRecord,
    LayerValues,
    MonitorRecord,
    Record,
    RecordFile,
    RunRecord,
    StepRecord,
)

TOKENS_PER_STEP = 100
ENVIRONMENT = {"commit": "c0ffee", "torch": "2.13.0", "cpu": "Abacus", "num_threads": 2}
Writer = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Writer:
    """``write_run("name", losses=[...], structure={...})`` gives the run's folder."""

    def write(name: str, folder: str = "runs", **options: Any) -> Path:
        path = tmp_path / folder / name.replace("/", "_")
        path.mkdir(parents=True)
        records = RecordFile(path / "records.jsonl")
        for record in run_records(name, **options):
            records.append(record)
        return path

    return write


def run_records(
    name: str,
    *,
    losses: list[float] | None = None,
    structure: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    finished: bool = True,
    is_monitored: bool = False,
    num_evals: int = 4,
    **config: Any,
) -> list[Record]:
    """A step for each of ``losses``, ``num_evals`` evaluations 0.05 above the training loss."""
    losses = losses or [5.0 / step**0.2 for step in range(1, 41)]
    flops = 3 * 50.0 * TOKENS_PER_STEP
    run = RunRecord(
        name=name,
        config={"name": name, "seed": 0, "structure": structure or {}} | config,
        environment=ENVIRONMENT if environment is None else environment,
        num_params=1234,
        num_ffn_params=567,
        num_non_embedding_params=1000,
        forward_flops_per_token=50.0,
        training_flops=flops * len(losses),
        num_steps=len(losses),
        tokens_per_step=TOKENS_PER_STEP,
    )
    records: list[Record] = [run]
    for step, loss in enumerate(losses, start=1):
        records.append(
            StepRecord(
                step=step,
                num_tokens=step * TOKENS_PER_STEP,
                loss=loss,
                learning_rate=1e-3,
                grad_norm=1.0,
                step_ms=10.0,
                model_flops=flops * step,
                executed_flops=1.25 * flops * step,
            )
        )
        if num_evals and step % max(1, len(losses) // num_evals) == 0:
            records.append(evaluation(step, loss + 0.05))
        if is_monitored:
            records.append(monitor(step))
    if is_monitored:
        records.append(EventRecord(event=LOSS_SPIKE, step=3))
    return [*records, EventRecord(event="finished", step=len(losses))] if finished else records


def evaluation(step: int, loss: float) -> EvalRecord:
    return EvalRecord(
        step=step,
        num_tokens=step * TOKENS_PER_STEP,
        source="validation",
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=None,
        num_eval_tokens=10,
        seconds=1.0,
    )


def monitor(step: int) -> MonitorRecord:
    layers = {
        f"model.layers.{index}.mlp.{name}": LayerValues(
            factor_norms={"V": 1.0 + index + step / 10, "U": 2.0},
            product_rms=0.5,
            change_rms=0.001 / step,
            grad_norm=1.0,
        )
        for index in range(2)
        for name in ("c_fc", "c_proj")
    }
    return MonitorRecord(step=step, guide_alpha=1 / step, layers=layers)


def benchmark(tokens: int, width: int = 64, **settings: Any) -> BenchmarkRecord:
    def case(ms: float, ideal: float | None) -> CaseTimes:
        return CaseTimes(
            median_ms=ms * tokens,
            spread_ms=0.1 * tokens,
            speedup=2.0 / ms,
            ideal_speedup=ideal,
            num_tokens=None,
        )

    return BenchmarkRecord(
        benchmark="kernel",
        settings={"shape": [width, 4 * width], "num_tokens": tokens, "dtype": "fp32", **settings},
        environment=ENVIRONMENT,
        baseline="dense",
        rounds=3,
        cases={"dense": case(2.0, None), "low_rank": case(1.0, 3.2)},
        bars=[{"name": "low_rank", "value": 1.5, "limit": 2.0, "at_most": True}],
    )


@pytest.fixture
def study(write_run: Writer, tmp_path: Path) -> Path:
    """A folder with four runs of three families, one monitored and one unfinished, and two
    benchmarks."""
    low_rank = {"structure": "low_rank", "param_ratio": 0.32}
    write_run("dense-0", seed=0)
    write_run("dense-1", seed=1, losses=[6.0 / step**0.25 for step in range(1, 41)])
    write_run("low", structure=low_rank, is_monitored=True)
    write_run("blocks", structure={"structure": "block_dense"}, finished=False)
    benchmarks = RecordFile(tmp_path / "runs" / "speed.jsonl")
    for tokens in (1, 64):
        benchmarks.append(benchmark(tokens))
    return tmp_path / "runs"

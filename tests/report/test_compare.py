from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from factorlm.errors import DataError
from factorlm.records import (
    LOSS_SPIKE,
    EvalRecord,
    EventRecord,
    GenerationRecord,
    MonitorRecord,
    RecordFile,
    RunRecord,
    StepRecord,
)
from factorlm.report import (
    comparison_json,
    comparison_notes,
    comparison_table,
    comparison_tables,
    read_run,
    read_runs,
)
from factorlm.report.compare import structure_label

TOKENS_PER_STEP = 100


def write_run(
    folder: Path,
    *,
    num_params: int = 1000,
    flops: float = 50.0,
    losses: tuple[float, ...] = (4.0, 3.0, 3.5),
    step_ms: float = 10.0,
    finished: bool = True,
    generation: float | None = None,
    structure: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> Path:
    """A run of four steps a loss, evaluated after each four."""
    folder.mkdir(parents=True)
    records = RecordFile(folder / "records.jsonl")
    records.append(
        RunRecord(
            name=folder.name,
            config={"structure": structure or {}, "data": data or {"path": "d"}},
            environment={},
            num_params=num_params,
            num_ffn_params=num_params // 2,
            num_non_embedding_params=num_params // 2,
            forward_flops_per_token=flops,
            training_flops=3 * flops * TOKENS_PER_STEP * 12,
            num_steps=12,
            tokens_per_step=TOKENS_PER_STEP,
        )
    )
    for step in range(1, 4 * len(losses) + 1):
        slow = 50 if step == 1 else 1
        records.append(
            StepRecord(
                step=step,
                num_tokens=step * TOKENS_PER_STEP,
                loss=losses[(step - 1) // 4] + 0.1,
                learning_rate=1e-3,
                grad_norm=1.0,
                step_ms=step_ms * slow,
            )
        )
        if step % 4 == 0:
            for source, extra in (("validation", 0.0), ("another text", -2.0)):
                loss = losses[step // 4 - 1] + extra
                records.append(
                    EvalRecord(
                        step=step,
                        num_tokens=step * TOKENS_PER_STEP,
                        source=source,
                        loss=loss,
                        perplexity=math.exp(loss),
                        bits_per_byte=None,
                        num_eval_tokens=10,
                        seconds=1000.0,
                    )
                )
    for speed in [5.0, generation] if generation else []:
        records.append(
            GenerationRecord(
                prompt="",
                text="",
                num_prompt_tokens=1,
                num_new_tokens=1,
                seconds=1,
                tokens_per_second=speed,
            )
        )
    if finished:
        records.append(EventRecord(event="finished", step=12))
    return folder


def test_summary_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", generation=30.0))
    assert run.is_finished
    assert run.num_tokens == 1200
    assert run.training_flops == 3 * 50 * 1200
    assert run.train_tokens_per_second == pytest.approx(10_000)
    assert run.train_seconds == pytest.approx((11 + 50) * 0.01)
    assert run.best is not None
    assert run.last is not None
    assert (run.best.loss, run.last.loss) == (3.0, 3.5)
    assert run.generation is not None
    assert run.generation.tokens_per_second == 30.0


def test_table_relates_to_the_first_run(tmp_path: Path) -> None:
    first = write_run(tmp_path / "dense", generation=30.0, losses=(4.0, 3.0, 3.0))
    second = write_run(
        tmp_path / "small",
        num_params=320,
        flops=25.0,
        losses=(4.0, 3.25),
        step_ms=5.0,
        finished=False,
        structure={"structure": "low_rank", "param_ratio": 0.32},
    )
    runs = [read_run(first), read_run(second)]
    table = comparison_table(runs)
    assert table.header == ("", "dense", "small *", "vs first")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["structure"] == ("dense", "low_rank, 32%", "")
    assert rows["parameters"] == ("1,000", "320", "0.32x")
    assert rows["training tokens"] == ("1,200", "800", "0.67x")
    assert rows["training FLOPs"] == ("1.800e5", "6.000e4", "0.33x")
    assert rows["best validation loss"] == ("3.0000", "3.2500", "+0.2500")
    assert rows["perplexity (best)"] == ("20.09", "25.79", "1.28x")
    assert rows["training tokens/s"] == ("10,000", "20,000", "2.00x")
    assert rows["generation tokens/s"] == ("30.0", "–", "")
    assert rows["bits per byte (best)"] == ("–", "–", "")
    assert rows["steps"] == ("12", "8 of 12", "")
    assert comparison_notes(runs) == ["* unfinished"]


def test_many_runs_go_into_tables_that_fit(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"run_{number}")) for number in range(5)]
    tables = comparison_tables(runs, 75)
    assert [table.header[1] for table in tables] == ["run_0", "run_0"]
    assert [table.header[2::2] for table in tables] == [("run_1", "run_2"), ("run_3", "run_4")]
    assert max(len(line) for table in tables for line in table.plain().splitlines()) <= 75
    assert comparison_tables(runs, None) == [comparison_table(runs)]
    assert len(comparison_tables(runs, 1)) == 4


def test_json_has_the_same_numbers(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", step_ms=5.0))]
    first, second = json.loads(json.dumps(comparison_json(runs), allow_nan=False))
    assert first["perplexity"] == math.exp(3.0)
    assert first["generation_tokens_per_second"] is None
    assert first["relative"]["best_validation_loss"] == 0.0
    assert second["relative"]["train_tokens_per_second"] == pytest.approx(2.0)
    assert second["relative"]["generation_tokens_per_second"] is None


def test_infinite_perplexity_is_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", losses=(3.0,))
    text = (run / "records.jsonl").read_text().replace(str(math.exp(3.0)), "Infinity")
    (run / "records.jsonl").write_text(text)
    (found,) = json.loads(json.dumps(comparison_json([read_run(run)]), allow_nan=False))
    assert found["perplexity"] is None


def test_run_without_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", losses=(3.0,), finished=False)
    lines = (run / "records.jsonl").read_text().splitlines()
    (run / "records.jsonl").write_text("\n".join(lines[:3]))
    summary = read_run(run)
    assert summary.best is None
    rows = {row[0]: row[1:] for row in comparison_table([summary]).rows}
    assert rows["best validation loss"] == ("–",)


def test_a_copy_of_the_records_is_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    copy = tmp_path / "published.jsonl"
    copy.write_bytes((run / "records.jsonl").read_bytes())
    assert read_run(copy) == read_run(run)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder / "a") for folder in ("one", "two")]
    paths.append(write_run(tmp_path / "one" / "b"))
    assert [run.label for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "b"]


def test_other_data_is_noted(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", data={"path": "one", "context_length": 8})),
        read_run(write_run(tmp_path / "b", data={"path": "two", "context_length": 8})),
    ]
    assert comparison_notes(runs) == ["data.path differs: one, two"]


def test_monitors_and_loss_spikes_are_read_and_spikes_noted(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for number, folder in enumerate(folders):
        records = RecordFile(folder / "records.jsonl")
        for step in range(1, 5 * number + 1):
            detail = {"layer": "model.norm"} if step == 1 else {}
            records.append(EventRecord(event=LOSS_SPIKE, step=step, detail=detail))
            records.append(MonitorRecord(step=step, guide_alpha=None, layers={}))
    runs = [read_run(folder) for folder in folders]
    assert [len(run.monitors) for run in runs] == [0, 5, 10]
    assert [event.step for event in runs[1].spikes] == [1, 2, 3, 4, 5]
    assert comparison_notes(runs) == [
        "b: loss spikes at step 1 (model.norm), step 2, step 3, step 4, 1 more",
        "c: loss spikes at step 1 (model.norm), step 2, step 3, step 4, 6 more",
    ]


def test_missing_runs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "dense")
    with pytest.raises(DataError, match=r"dens: no such run\. Did you mean 'dense'\?"):
        read_run(tmp_path / "dens")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: not a run: it holds no records\.jsonl"):
        read_run(tmp_path / "empty")
    (tmp_path / "empty" / "records.jsonl").touch()
    with pytest.raises(DataError, match="hold no training step yet"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize(
    ("section", "label"),
    [
        ({}, "dense"),
        ({"structure": "low_rank", "rank": 64}, "low_rank, rank 64"),
        ({"structure": "low_rank", "param_ratio": 0.32, "multiple_of": 8}, "low_rank, 32%"),
        (
            {"structure": "block_dense", "num_blocks": 4, "rank": 8, "keep_first_dense": True},
            "block_dense, blocks 4, rank 8",
        ),
        (
            {"structure": "low_rank", "rank": 8, "keep_first_dense": False},
            "low_rank, first too, rank 8",
        ),
        ({"layers": {"*": {"structure": "dense"}}}, "by layer"),
        (
            {"structure": "low_rank", "rank": 8, "param_ratio": None, "layers": None},
            "low_rank, rank 8",
        ),
    ],
)
def test_structure_label(section: dict[str, Any], label: str) -> None:
    assert structure_label(section) == label


def test_flops_are_those_that_the_steps_say_and_guided_evaluations_are_no_best(
    tmp_path: Path,
) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.executed_flops is None
    steps = (*run.steps[:-1], replace(run.steps[-1], model_flops=7.0, executed_flops=5.0))
    assert run.best is not None
    evals = [replace(r, guided=r.loss == run.best.loss) for r in run.evals]
    guided = replace(run, steps=steps, evals=tuple(evals))
    assert (guided.training_flops, guided.executed_flops) == (7.0, 5.0)
    assert guided.best is not None
    assert guided.best.loss > run.best.loss

"""Training throughput of factorlm's Trainer against a plain PyTorch loop, alternating in one run.

The plain loop is what a user would write by hand: the same Hugging Face model, its own loss, the
same fused AdamW, the same clipping and autocast, batches already in memory. The Trainer does all
it does in a real run: reads its batches from shards, watches for signals, checks for NaN, writes a
record a step, draws its progress.

    python benchmarks/train_throughput.py --recipe recipes/demo_dense.yaml --steps 30 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _publish import publish

from factorlm.data import TokenLoader, open_dataset
from factorlm.distributed import World
from factorlm.measure import environment
from factorlm.records import RecordFile, StepRecord
from factorlm.train import TrainConfig, load_recipe
from factorlm.train.assemble import build_model
from factorlm.train.callbacks import Callback
from factorlm.train.metrics import ProgressBar
from factorlm.train.parallelize import autocast_dtype
from factorlm.train.trainer import Trainer

WARM_UP = 5


def plain_steps(config: TrainConfig, steps: int) -> float:
    """Seconds a step of a loop written by hand."""
    torch.manual_seed(config.seed)
    model = build_model(config, device="cpu")[0].train()
    dtype = autocast_dtype(config.parallel.precision, torch.device("cpu"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.from_numpy(
        open_dataset(config.data.path).split("train").streams[0].read(0, 10**6).astype("int64")
    )
    length, rows = config.data.context_length, config.batch.num_sequences
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            started = time.perf_counter()
        starts = torch.randint(len(tokens) - length, (rows,))
        ids = torch.stack([tokens[i : i + length] for i in starts])
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return (time.perf_counter() - started) / steps


class Clock(Callback):
    """The wall time between two steps, records and progress included."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds = first, last, 0.0

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.first:
            self.seconds = -time.perf_counter()
        elif record.step == self.last:
            self.seconds += time.perf_counter()


def trainer_steps(config: TrainConfig, steps: int) -> float:
    """Seconds a step of the Trainer."""
    clock = Clock(WARM_UP, WARM_UP + steps)
    progress = ProgressBar()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(config, runs_dir=folder, callbacks=[progress, clock]).fit()
    return clock.seconds / steps


def loader_and_record_ms(config: TrainConfig, steps: int = 200) -> tuple[float, float]:
    """Milliseconds a step of reading the batch, and of writing the record."""
    data = open_dataset(config.data.path)
    loader = TokenLoader(
        data,
        context_length=config.data.context_length,
        sequences_per_step=config.batch.num_sequences,
        seed=0,
    )
    started = time.perf_counter()
    for step in range(steps):
        loader.batch(step)
    read = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        records = RecordFile(Path(folder) / "records.jsonl")
        for step in range(steps):
            record = StepRecord(
                step=step, num_tokens=step, loss=1.5, learning_rate=1e-3, grad_norm=0.5, step_ms=9.9
            )
            records.append(record)
        written = time.perf_counter()
    return 1000 * (read - started) / steps, 1000 * (written - read) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo_dense.yaml"))
    parser.add_argument("--steps", type=int, default=30, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="append the result as one line of JSON")
    args, overrides = parser.parse_known_args()
    config = load_recipe(args.recipe, overrides)
    values = config.to_dict()
    values["batch"] |= {"num_steps": WARM_UP + args.steps, "num_tokens": None}
    values["eval"] |= {"every_steps": None, "num_tokens": None}
    config = TrainConfig.from_dict(values)
    plain, ours = [], []
    for number in range(args.rounds):
        plain.append(plain_steps(config, args.steps))
        ours.append(trainer_steps(config, args.steps))
        print(
            f"round {number + 1}: plain {plain[-1] * 1000:.1f} ms, "
            f"Trainer {ours[-1] * 1000:.1f} ms, ratio {plain[-1] / ours[-1]:.3f}"
        )
    ratios = [p / o for p, o in zip(plain, ours, strict=True)]
    load_ms, record_ms = loader_and_record_ms(config)
    result = {
        "benchmark": "train_throughput",
        "recipe": args.recipe.name,
        "environment": environment(World.start().device),
        "plain_step_ms": [round(1000 * value, 2) for value in plain],
        "trainer_step_ms": [round(1000 * value, 2) for value in ours],
        "throughput_ratio_median": round(statistics.median(ratios), 4),
        "throughput_ratio_min": round(min(ratios), 4),
        "throughput_ratio_max": round(max(ratios), 4),
        "loader_ms": round(load_ms, 4),
        "record_ms": round(record_ms, 4),
        "loader_and_record_share": round((load_ms + record_ms) / 1000 / statistics.median(ours), 5),
        "bars": {"throughput_ratio": 0.98, "loader_and_record_share": 0.02},
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()

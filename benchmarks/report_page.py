"""How long a report page of many runs takes to make, and to open in headless Chromium.

Runs are invented: 300 of 5,000 steps each, unless told otherwise, four families over sizes with
three seeds, whose fitted laws are on the page as `factorlm report` draws them. Opening goes from
asking for the file to the curves being painted, in a fresh browser every time. Chromium is the
system's.

    python benchmarks/report_page.py --output reports/report_page/records/report_page.jsonl
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _publish import publish

from factorlm.measure import environment
from factorlm.records import EvalRecord, EventRecord, RunRecord, StepRecord
from factorlm.report import gather, report_fits, write_page

FAMILIES = ("dense", "low_rank", "block_shuffle", "block_dense")
NUM_SEEDS = 3
TOKENS_PER_STEP = 4096
BAR_SECONDS = 3.0
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
IS_PAINTED = """async () => {
  const curves = document.getElementById("curves");
  while (!curves.querySelector(".scatterlayer .trace")) await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return performance.now() / 1000;
}"""


def write_runs(folder: Path, num_runs: int, num_steps: int) -> None:
    """Invent ``num_runs`` record files below ``folder``, evaluated ten times each."""
    rng = np.random.default_rng(0)
    for index in range(num_runs):
        number, structure = index // len(FAMILIES), FAMILIES[index % len(FAMILIES)]
        size = 1e5 * 1.2 ** (number // NUM_SEEDS)
        start = run_record(f"run_{index:03d}", structure, size, number % NUM_SEEDS, num_steps)
        floor = 2 + 8 * size**-0.1
        losses = floor + 6 * np.arange(1, num_steps + 1) ** -0.3 + rng.normal(0, 0.05, num_steps)
        path = folder / start.name / "records.jsonl"
        path.parent.mkdir(parents=True)
        records = [start, *step_records(start, losses), EventRecord(event="finished", step=1)]
        path.write_text("".join(record.to_json() + "\n" for record in records))


def run_record(name: str, structure: str, size: float, seed: int, num_steps: int) -> RunRecord:
    """A run of ``size`` parameters."""
    flops = 2 * size
    return RunRecord(
        name=name,
        config={"name": name, "seed": seed, "structure": {"structure": structure}},
        environment={"cpu": "invented", "num_threads": 1},
        num_params=int(size),
        num_ffn_params=int(size / 2),
        num_non_embedding_params=int(size),
        forward_flops_per_token=flops,
        training_flops=3 * flops * TOKENS_PER_STEP * num_steps,
        num_steps=num_steps,
        tokens_per_step=TOKENS_PER_STEP,
    )


def step_records(run: RunRecord, losses: np.ndarray) -> list[StepRecord | EvalRecord]:
    """Every step, and an evaluation after each tenth of them."""
    found: list[StepRecord | EvalRecord] = []
    for step, loss in enumerate(losses.tolist(), start=1):
        tokens = step * TOKENS_PER_STEP
        spent = 3 * run.forward_flops_per_token * tokens
        found.append(
            StepRecord(
                step=step,
                num_tokens=tokens,
                loss=loss,
                learning_rate=1e-3,
                grad_norm=1.0,
                step_ms=50.0,
                model_flops=spent,
                executed_flops=spent,
            )
        )
        if step % max(1, len(losses) // 10) == 0:
            found.append(eval_record(step, tokens, loss))
    return found


def eval_record(step: int, num_tokens: int, loss: float) -> EvalRecord:
    """An evaluation of the validation split."""
    return EvalRecord(
        step=step,
        num_tokens=num_tokens,
        source="validation",
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=None,
        num_eval_tokens=1000,
        seconds=1.0,
    )


def find_chromium() -> str | None:
    """The system's Chromium."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


def open_seconds(page: Path, chromium: str) -> float:
    """From asking for ``page`` to its curves being painted, in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        tab = browser.new_page(viewport={"width": 1280, "height": 1600})
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_selector("#curves", state="attached")
        seconds = float(tab.evaluate(IS_PAINTED))
        browser.close()
    return seconds


def make_page(folder: Path) -> tuple[Path, dict[str, float]]:
    """The page of runs in ``folder`` as ``factorlm report`` makes it, and seconds of each part."""
    started = time.perf_counter()
    report = gather([folder])
    gathered = time.perf_counter()
    fits = report_fits(report)
    fitted = time.perf_counter()
    page = write_page(report, folder / "report.html", fits)
    return page, {
        "gather_seconds": gathered - started,
        "fit_seconds": fitted - gathered,
        "write_seconds": time.perf_counter() - fitted,
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of every part, and the size of the page."""
    chromium = find_chromium()
    assert chromium is not None, "needs Chromium: apt-get install chromium"
    write_runs(folder, args.runs, args.steps)
    page, seconds = make_page(folder)
    opened = [open_seconds(page, chromium) for _ in range(args.rounds)]
    return {
        "benchmark": "report_page",
        "environment": environment(),
        "num_runs": args.runs,
        "num_steps": args.steps,
        **seconds,
        "open_seconds": opened,
        "median_open_seconds": statistics.median(opened),
        "bar_seconds": BAR_SECONDS,
        "page_bytes": page.stat().st_size,
    }


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the result to it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish(measure(args, Path(folder)), args.output)


if __name__ == "__main__":
    main()

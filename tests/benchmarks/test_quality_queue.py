"""The queue of reports/quality, with a stand-in for ``factorlm train``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.benchmarks.test_quality import RECIPES, load_script

from factorlm.records import EvalRecord, RecordFile, StepRecord

STAND_IN = f"""#!{sys.executable}
# Finishes at once; but in its first try at `b` it has the queue stopped, and waits for its signal.
import os, pathlib, signal, sys, time
recipe, runs = pathlib.Path(sys.argv[4]), pathlib.Path(sys.argv[6])
name, folder = recipe.stem, runs / recipe.stem
again = folder.exists()
folder.mkdir(exist_ok=True)
with (runs / "started").open("a") as log:
    log.write(f"{{name}} {{'resumed' if again else 'new'}}\\n")
if name.startswith("b-") and not again:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
    sys.exit(1)
(folder / "records.jsonl").write_bytes((runs / "records.jsonl").read_bytes())
"""


def records() -> str:
    """Of a run of 31 steps."""
    step = {"num_tokens": 1, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0, "step_ms": 1.0}
    last = EvalRecord(
        step=31,
        num_tokens=1,
        source="validation",
        loss=2.5,
        perplexity=12.2,
        bits_per_byte=None,
        num_eval_tokens=1,
        seconds=1.0,
    )
    steps = [StepRecord(step=number, **step) for number in range(1, 32)]  # type: ignore[arg-type]
    return "".join(record.to_json() + "\n" for record in [*steps, last])


@pytest.fixture
def quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script with a plan of three runs, of which ``a`` has its record."""
    found = load_script("quality")
    monkeypatch.setattr(found, "REPORT", tmp_path / "report")
    monkeypatch.setattr(found, "RUNS", tmp_path / "runs")
    (tmp_path / "report" / "records").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    row = {"recipe": "dense", "optimizer": {"kind": "muon"}, "rate": 8e-3, "points": ["T"]}
    plan = {"recipes": RECIPES, "rows": {}, "transfer": {"widths": []}}
    plan |= {"full": dict.fromkeys("abc", row)}
    (tmp_path / "report" / "plan.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "report" / "records" / "a-T-s0.jsonl").write_text(records())
    (tmp_path / "runs" / "records.jsonl").write_text(records())
    (tmp_path / "train").write_text(STAND_IN)
    (tmp_path / "train").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "train"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_queue_skips_what_has_its_record_stops_and_goes_on(
    quality: Any, tmp_path: Path
) -> None:
    def started() -> list[str]:
        return (tmp_path / "runs" / "started").read_text().splitlines()

    stopped = quality.Queue(workers=1, hours=1.0)
    stopped.run()
    assert stopped.stopped
    assert started() == ["b-T-s0 new"]
    assert quality.load_losses() == {"a-T-s0": 2.5}
    quality.Queue(workers=2, hours=1.0, first=["c-*"]).run()
    assert sorted(started()[1:]) == ["b-T-s0 resumed", "c-T-s0 new"]
    assert quality.load_losses() == dict.fromkeys(("a-T-s0", "b-T-s0", "c-T-s0"), 2.5)
    kept = list(RecordFile(tmp_path / "report" / "records" / "b-T-s0.jsonl"))
    assert [(type(record), record.step) for record in kept] == [(StepRecord, 30), (EvalRecord, 31)]
    quality.Queue(workers=1, hours=1.0).run()
    assert len(started()) == 3


def test_no_run_begins_after_the_queues_hours_and_a_failed_one_is_not_published(
    quality: Any, tmp_path: Path
) -> None:
    quality.Queue(workers=1, hours=0.0).run()
    assert not (tmp_path / "runs" / "started").exists()
    (tmp_path / "runs" / "records.jsonl").unlink()  # the stand-in fails
    (tmp_path / "runs" / "b-T-s0").mkdir()
    quality.Queue(workers=1, hours=1.0).run()
    assert quality.load_losses() == {"a-T-s0": 2.5}
    assert len((tmp_path / "runs" / "started").read_text().splitlines()) == 2

"""What ``scale plan`` and ``scale run`` show of a queue: lines, a live table, the last word."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from factorlm.cli.main import main
from factorlm.cli.scale import _ladder
from factorlm.cli.scale._ladder import Display
from factorlm.scaling.ladder.folder import Progress
from factorlm.scaling.ladder.queue import Queue
from factorlm.scaling.ladder.state import State, Status


def state(status: dict[str, Status], step: int | None = None, **losses: float) -> State:
    """Of runs of 1,000 steps; those that run are at ``step``."""
    running = [name for name, value in status.items() if value is Status.RUNNING]
    return State(
        runs=[],
        status=status,
        losses=losses,
        progress={} if step is None else {name: Progress(step, 4.25) for name in running},
        num_steps=dict.fromkeys(running, 1000),
    )


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds

    def strftime(self, form: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(_ladder, "time", found)
    return found


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rich sees it, 100 characters wide."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


Ended = Callable[[dict[str, Status], bool], tuple[int, str]]


@pytest.fixture
def ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ended:
    """Exit code and last line of ``scale run`` where the queue ends so."""
    (tmp_path / "recipe.yaml").write_text("model: {preset: gpt_nano, vocab_size: 257}\n")
    ladder = tmp_path / "toy.yaml"
    ladder.write_text("{recipe: recipe.yaml, sizes: {a: {}}, families: {dense: {}}}\n")

    def run(status: dict[str, Status], was_stopped: bool) -> tuple[int, str]:
        def end(queue: Queue) -> State:
            queue.was_stopped = was_stopped
            return state(status)

        monkeypatch.setattr(Queue, "run", end)
        code = main(["scale", "run", str(ladder), "--runs-dir", str(tmp_path)])
        last = capsys.readouterr().err.splitlines()[-1]
        return code, re.sub(r"^factorlm scale: (error: )?", "", last)

    return run


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The lines that were drawn last, by their columns, without the terminal's codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip()]


@pytest.mark.usefixtures("terminal")
def test_the_table_has_what_runs_and_how_long_it_will(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {"a": Status.RUNNING, "b": Status.READY, "c": Status.WAITING, "d": Status.DONE}
    with Display() as display:
        display.show(state(status))
        display.live.refresh()
        assert ["a", "starts", "1,000"] in rows(capsys)
        display.show(state(status, step=100))
        display.live.refresh()
        assert ["a", "100", "1,000", "4.2500"] in rows(capsys)
        clock.seconds += 30
        display.show(state(status, step=400))
        display.live.refresh()
        drawn = rows(capsys)
        assert ["1 waits for its rate, 1 to run, 1 running, 1 done"] in drawn
        assert ["run", "step", "of", "training loss", "left"] in drawn
        assert ["a", "400", "1,000", "4.2500", "1:00 min"] in drawn


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("steps", [[150, 100], [100, None, 100]])
def test_a_run_that_went_back_or_paused_is_timed_anew(
    steps: list[int | None], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Display() as display:
        for step in steps:
            display.show(state({"a": Status.READY if step is None else Status.RUNNING}, step))
            clock.seconds += 1000
        clock.seconds -= 990
        display.show(state({"a": Status.RUNNING}, step=200))
        display.live.refresh()
        assert rows(capsys)[-1] == ["a", "200", "1,000", "4.2500", "1:20 min"]


@pytest.mark.usefixtures("clock")
def test_a_line_for_every_change_and_none_for_what_was_done_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns = [
        state({"a": Status.RUNNING, "b": Status.READY, "c": Status.DONE}, c=3.0),
        state({"a": Status.DONE, "b": Status.RUNNING, "c": Status.DONE}, a=2.5, c=3.0),
        state({"a": Status.DONE, "b": Status.RUNNING, "c": Status.DONE}, a=2.5, c=3.0),
    ]
    with Display() as display:
        for turn in turns:
            display.show(turn)
    assert capsys.readouterr().err.splitlines() == [
        "12:00:00 a running",
        "12:00:00 a done: validation loss 2.5000",
        "12:00:00 b running",
    ]


@pytest.mark.parametrize(
    ("last", "was_stopped", "code", "told"),
    [
        (Status.DONE, False, 0, "2 done"),
        (Status.FAILED, False, 1, "1 done, 1 failed; failed: b"),
        (Status.READY, True, 75, "1 to run, 1 done; the same command goes on"),
    ],
)
def test_the_last_word_and_the_exit_code(
    last: Status, was_stopped: bool, code: int, told: str, ended: Ended
) -> None:
    assert ended({"a": Status.DONE, "b": last}, was_stopped) == (code, told)


def test_stopped_after_a_failure_is_stopped(ended: Ended) -> None:
    status = {"a": Status.FAILED, "b": Status.READY}
    told = "1 to run, 1 failed; failed: a; the same command goes on"
    assert ended(status, True) == (75, told)

"""``factorlm scale run``: train what a ladder lacks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from factorlm.cli.scale._ladder import Display, add_ladder_arguments, read_ladder, warn

if TYPE_CHECKING:
    from factorlm.scaling.ladder.state import State

HELP = "train what a ladder lacks; stopped or killed, the same command goes on"
EPILOG = """\
Every run is `factorlm train` in a process of its own, in DIR/<ladder>/<run>, beside its resolved
recipe and its log. What is done is not done again. A run that fails is tried once more, then left
out; the others go on, and the exit code is 1. Ctrl-C lets runs save a checkpoint and exits with
code 75.

examples:
  factorlm scale run recipes/ladders/books.yaml
  factorlm scale run recipes/ladders/books.yaml --records reports/ladder/records
  factorlm scale run ladder.yaml --executor ray --workers 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_ladder_arguments(parser)


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Run the queue; 0 if every run is done."""
    from factorlm.scaling.ladder.executors import build_executor
    from factorlm.scaling.ladder.folder import LadderFolder
    from factorlm.scaling.ladder.plan import Plan
    from factorlm.scaling.ladder.queue import Queue

    file = read_ladder(args)
    folder = LadderFolder(args.runs_dir / file.ladder.name, args.records)
    with build_executor(file.ladder.executor) as executor, Display() as display:
        queue = Queue(
            Plan(file), folder, executor, on_state=display.show, on_failure=display.show_failure
        )
        state = queue.run()
    return _finish(state, was_stopped=queue.was_stopped)


def _finish(state: State, *, was_stopped: bool) -> int:
    """Say what became of the ladder; the exit code."""
    from factorlm.errors import FactorlmError, InterruptedRun
    from factorlm.scaling.ladder.state import Status

    counts = ", ".join(
        f"{count} {status.value}" for status in Status if (count := state.count(status))
    )
    failed = [name for name, status in state.status.items() if status is Status.FAILED]
    told = f"{counts}; failed: {', '.join(failed)}" if failed else counts
    if was_stopped:
        raise InterruptedRun(f"{told}; the same command goes on")
    if failed:
        raise FactorlmError(told)
    warn(counts)
    return 0

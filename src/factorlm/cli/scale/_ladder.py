"""What ``scale plan`` and ``scale run`` have in common: their arguments, and the live table."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

    from factorlm.scaling.ladder.config import LadderFile
    from factorlm.scaling.ladder.state import Failure, State


def add_ladder_arguments(parser: argparse.ArgumentParser) -> None:
    """The ladder, its folder, and where its runs run."""
    parser.add_argument("ladder", type=Path, help="YAML file; see docs/how-to/run-a-ladder.md")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="keep the records of finished runs here too, every thirtieth step of them; a run "
        "whose records are here is done",
    )
    parser.add_argument("--executor", metavar="KIND", help="local, ray or slurm, over the file's")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at a time, over the file's")


def read_ladder(args: argparse.Namespace) -> LadderFile:
    """The ladder with what the command line states over it."""
    import dataclasses

    from factorlm.scaling.ladder import load_ladder

    file = load_ladder(args.ladder)
    changes: dict[str, Any] = {}
    if args.workers is not None:
        changes["workers"] = args.workers
    if args.executor is not None:
        changes["kind"] = args.executor
        if args.executor != file.ladder.executor.kind:
            changes["options"] = {}  # another cluster's
    executor = file.ladder.executor.replace(**changes)
    return dataclasses.replace(file, ladder=file.ladder.replace(executor=executor))


class Display(AbstractContextManager["Display"]):
    """Shows a queue: a live table on a terminal, else a line for every change."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.started: dict[str, tuple[float, int]] = {}
        """When each run that runs was first seen at a step, and at which."""
        self.last: dict[str, str] = {}
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, state: State) -> None:
        """Draw the state of a queue."""
        from factorlm.scaling.ladder.state import Status

        self.started = {name: seen for name, seen in self.started.items() if name in state.progress}
        if self.console.is_terminal:
            self.live.update(self._table(state))
        for name, status in state.status.items():
            before = self.last.get(name)
            # what was done before the first look is nothing new
            shown = status is Status.RUNNING or (status is Status.DONE and before is not None)
            if shown and before != status.value:
                self._say(name, status.value, state)
        self.last = {name: status.value for name, status in state.status.items()}

    def show_failure(self, failure: Failure) -> None:
        """Say that a run failed, with the end of its log."""
        again = "it is left out" if failure.is_final else "it is tried once more"
        self.console.print(
            f"{failure.run.name} failed with exit code {failure.exit_code}; {again}. "
            f"The end of {failure.log}:\n{failure.reason}",
            style="red",
            markup=False,
            highlight=False,
        )

    def _say(self, name: str, status: str, state: State) -> None:
        loss = state.losses.get(name)
        tail = f": validation loss {loss:.4f}" if status == "done" and loss is not None else ""
        clock = time.strftime("%H:%M:%S")
        self.console.print(f"{clock} {name} {status}{tail}", markup=False, highlight=False)

    def _table(self, state: State) -> Group:
        from rich.console import Group
        from rich.table import Table

        from factorlm.scaling.ladder.state import Status

        counts = ", ".join(
            f"{count} {status.value}" for status in Status if (count := state.count(status))
        )
        table = Table(box=None, pad_edge=False)
        for name in ("run", "step", "of", "training loss", "left"):
            table.add_column(name, justify="left" if name == "run" else "right")
        for name, status in state.status.items():
            if status is Status.RUNNING:
                table.add_row(name, *self._progress(name, state))
        return Group(counts, table)

    def _progress(self, name: str, state: State) -> tuple[str, str, str, str]:
        from factorlm.report.tables import format_seconds

        total, found = state.num_steps[name], state.progress.get(name)
        if found is None:
            return "starts", f"{total:,}", "", ""
        now = time.monotonic()
        since, step = self.started.setdefault(name, (now, found.step))
        if found.step < step:  # resumed at an earlier checkpoint
            since, step = self.started[name] = now, found.step
        done = found.step - step
        left = format_seconds((total - found.step) * (now - since) / done) if done else ""
        return f"{found.step:,}", f"{total:,}", f"{found.loss:.4f}", left


def warn(text: str) -> None:
    """A line for the person, not for what reads the output."""
    print(text, file=sys.stderr)

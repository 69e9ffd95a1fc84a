"""How things are with a ladder that is run."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from factorlm.scaling.ladder.folder import Progress
from factorlm.scaling.ladder.plan import LadderRun


class Status(enum.Enum):
    """Of a run, in words."""

    WAITING = "waits for its rate"
    READY = "to run"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    run: LadderRun
    exit_code: int
    log: Path
    reason: str
    """What is known of it, or the end of the log."""
    is_final: bool
    """It was tried again already."""


@dataclass(frozen=True)
class State:
    """Of all runs at one moment."""

    runs: list[LadderRun]
    status: dict[str, Status]
    losses: dict[str, float]
    """Of those that are done."""
    progress: dict[str, Progress]
    """Of those that run."""
    num_steps: dict[str, int]
    """That those which run take in all."""

    def count(self, status: Status) -> int:
        """Runs of this status."""
        return sum(found is status for found in self.status.values())

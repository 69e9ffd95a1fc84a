"""Runs that no queue waits for."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from factorlm.scaling.ladder.executors import Handle
from factorlm.scaling.ladder.executors.base import INTERRUPTED
from factorlm.scaling.ladder.folder import LadderFolder
from factorlm.scaling.ladder.plan import LadderRun


class Orphan(Handle):
    """A run that a queue which is gone left running."""

    def __init__(self, folder: LadderFolder, run: LadderRun) -> None:
        self.folder, self.run = folder, run

    def poll(self) -> int | None:
        """None while its folder is held; after that the folder says what came of it."""
        return None if self.folder.holder(self.run) is not None else INTERRUPTED

    def stop(self) -> None:
        """By a signal to a process of this machine; a task or job of a cluster sees the file."""
        self.folder.stop_file(self.run).touch()
        pid = self.folder.holder(self.run)
        if pid:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)

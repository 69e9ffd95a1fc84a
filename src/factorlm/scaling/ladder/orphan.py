"""Runs that no queue waits for."""

from __future__ import annotations

import os
import signal

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
        """As for a child, if it is a process of this machine."""
        pid = self.folder.holder(self.run)
        if pid:
            try:
                os.kill(pid, signal.SIGTERM)
            except OSError:
                return

"""Where runs run: each kind of executor is a module here, found by its name.

An executor takes a job and gives a handle on it. To add one, add a module with a class registered
in ``EXECUTORS``.
"""

from factorlm.scaling.ladder.executors.base import (
    EXECUTORS,
    Executor,
    Handle,
    Job,
    build_executor,
)

__all__ = ["EXECUTORS", "Executor", "Handle", "Job", "build_executor"]

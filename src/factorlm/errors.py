"""The errors that a user can meet, each with the exit code that the command line gives it.

FactorlmError            1
├── ConfigError          3   a recipe, a flag or an argument is wrong
├── DataError            4   text or token shards are wrong or damaged
├── CheckpointError      5   a checkpoint is damaged, incomplete or not to be trusted
├── StorageError         6   disk full, read-only, locked by another process
├── PeerLostError        7   another rank went away
├── NumericError         8   a loss, gradient or logit is not finite
└── InterruptedRun      75   stopped by a signal with a complete checkpoint: run it again
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FactorlmError(Exception):
    """Base of every error that factorlm raises for a user."""

    exit_code = 1


class ConfigError(FactorlmError, ValueError):
    """A field has a value that its rule does not allow; the message names field, value and rule."""

    exit_code = 3


class DataError(FactorlmError, ValueError):
    """Text or token shards are missing, malformed or damaged."""

    exit_code = 4


class CheckpointError(FactorlmError, ValueError):
    """A checkpoint or model folder is damaged, incomplete, or does not fit where it is loaded."""

    exit_code = 5


class StorageError(FactorlmError, OSError):
    """A file or folder cannot be written, read or locked."""

    exit_code = 6


class PeerLostError(FactorlmError, RuntimeError):
    """Another process of a distributed run went away or stopped answering."""

    exit_code = 7


class NumericError(FactorlmError, ArithmeticError):
    """A loss, gradient, weight or logit is not finite."""

    exit_code = 8


class InterruptedRun(FactorlmError):  # noqa: N818 - it reports a clean stop, not a fault
    """A signal stopped the run after a complete checkpoint was written."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""

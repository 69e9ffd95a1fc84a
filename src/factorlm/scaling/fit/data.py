"""Measured points as arrays, checked; and scipy, which the fits need."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike

from factorlm.config import check
from factorlm.errors import ConfigError

Families = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name -> (training FLOPs, loss in nats), each (num_points,)."""
SAME_SIZE = 1.05
"""Values within so many times each other are one size: steps round FLOPs and tokens, and a
stochastic guide leaves seeds with slightly different ones."""


class ScipyMissingError(ConfigError):
    """Fits need the extra ``fit``."""


class FitWarning(UserWarning):
    """A law was fitted to data that cannot say what its parameters are."""


def warn_user(messages: Iterable[str]) -> None:
    """Each message as a ``FitWarning`` at the line that called a function of this package."""
    for message in messages:
        warnings.warn(message, FitWarning, stacklevel=3)


def import_scipy() -> ModuleType:
    """``scipy`` with ``optimize`` and ``stats``. Raises ``ScipyMissingError``, naming the extra."""
    try:
        import scipy.optimize
        import scipy.stats
    except ImportError:
        raise ScipyMissingError("fits need scipy: pip install 'factorlm[fit]'") from None
    return scipy


def as_points(**columns: ArrayLike) -> tuple[np.ndarray, ...]:
    """Columns of one value a run as float64 arrays, each (num_points,).

    Raises ``ConfigError`` naming the column, the value and the rule: one dimension, as many values
    as the other columns, every value finite and above zero.
    """
    arrays = {name: _as_floats(name, values) for name, values in columns.items()}
    (first, points), *_ = arrays.items()
    for name, array in arrays.items():
        check(array.ndim == 1, f"{name} has {array.ndim} dimensions; it must be a list of numbers")
        check(
            len(array) == len(points),
            f"{name} has {len(array)} values and {first} {len(points)}; they must be as many",
        )
        wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if len(wrong):
            place = int(wrong[0])
            raise ConfigError(f"{name}[{place}]={array[place]:g} must be finite and above 0")
    return tuple(arrays.values())


def _as_floats(name: str, values: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={values!r:.60} must be a list of numbers") from None


def size_numbers(values: np.ndarray) -> np.ndarray:
    """Which size each of ``values`` is, counted from 0 for the smallest; both (num_points,).

    A size holds what is within ``SAME_SIZE`` times its least value: FLOPs of seeds of one model, or
    its parameters.
    """
    known, owner = np.unique(values, return_inverse=True)
    numbers = np.zeros(len(known), dtype=np.int64)
    least, number = known[0], 0
    for index, value in enumerate(known):
        if value > SAME_SIZE * least:
            least, number = value, number + 1
        numbers[index] = number
    return numbers[owner]


def count_sizes(values: np.ndarray) -> int:
    """How many sizes ``values`` (num_points,) has, which is not empty."""
    return int(size_numbers(values).max()) + 1


def size_means(values: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One point a size: the geometric means of ``values`` and ``loss``, each (num_points,), over
    its runs; each (num_sizes,)."""
    owner = size_numbers(values)
    count = np.bincount(owner)
    means = [np.exp(np.bincount(owner, weights=np.log(a)) / count) for a in (values, loss)]
    return means[0], means[1]


def check_sizes(name: str, values: np.ndarray, least: int, form: str) -> None:
    """Raise ``ConfigError`` unless ``values`` has ``least`` sizes."""
    count = count_sizes(values) if len(values) else 0
    check(
        count >= least,
        f"{name} has {count} sizes; {form} needs at least {least} "
        f"(values within {SAME_SIZE:g} times each other are one)",
    )


def check_level(level: float) -> None:
    """Raise ``ConfigError`` unless ``level`` is the probability of an interval."""
    check(0 < level < 1, f"level={level:g} must be above 0 and below 1")


def check_entropy(E: float, loss: np.ndarray) -> None:
    """Raise ``ConfigError`` unless a fixed ``E`` lies under every loss."""
    check(
        0 <= E < loss.min(),
        f"E={E:g} must be at least 0 and below the lowest loss, {loss.min():g}",
    )

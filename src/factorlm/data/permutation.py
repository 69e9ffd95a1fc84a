"""A seeded permutation of 0 .. n-1 whose value at any position costs the same few operations."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8
GOLDEN_RATIO = 0x9E3779B97F4A7C15
MASK = 2**64 - 1

Words = npt.NDArray[np.uint64]


def permute(positions: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where a permutation of ``range(n)``, chosen by ``key``, sends ``positions``.

    ``positions``: integers in ``[0, n)``, any shape; the result is int64 of the same shape. A
    Feistel network on two digits to the bases a·b ≥ n (Black and Rogaway 2002, the generalised
    Feistel cipher), walked until it comes back into the range. Integer arithmetic alone, so the
    order is the same on every machine and with every version of NumPy.
    """
    base_left = math.isqrt(n - 1) + 1
    base_right = -(-n // base_left)
    keys = [np.uint64(hash_key(*key, turn)) for turn in range(NUM_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), base_left, base_right, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], base_left, base_right, keys)
    return values.astype(np.int64)


def hash_key(*parts: int) -> int:
    """One 64-bit number from several."""
    value = 0
    for part in parts:
        value = _mix_int((value + GOLDEN_RATIO + part) & MASK)
    return value


def _feistel(values: Words, base_left: int, base_right: int, keys: list[np.uint64]) -> Words:
    a, b = np.uint64(base_left), np.uint64(base_right)
    left, right = values // b, values % b
    for turn, key in enumerate(keys):
        if turn % 2 == 0:
            left = (left + _mix(right + key) % a) % a
        else:
            right = (right + _mix(left + key) % b) % b
    return left * b + right


def _mix(value: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), which scatters 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix_int(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)

"""A shuffle without a random generator: who stands where follows from (seed, epoch, position) alone, so there is no state to save."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(index: np.ndarray, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Hash every number of `index`, independently for each (seed, epoch, stream).

    index: int64[N]. Returns: uint64[N].
    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the four numbers.
    """
    value = np.zeros(1, dtype=np.uint64)
    for number in (seed, epoch, stream):
        value = _mix(value ^ np.array([number % 2**64], dtype=np.uint64))
    return _mix(value ^ index.astype(np.uint64))


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permutation(size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch, int64[size]: each of 0 ... size - 1 once."""
    return np.argsort(hash64(np.arange(size), seed=seed, epoch=epoch, stream=0), kind="stable")

"""Other ways to fill rows, written plainly from what their projects describe; trl's own where it is installed.

Each takes lengths (int64[N], each <= capacity, in the order of arrival) and returns the number of rows.
"""

from __future__ import annotations

import heapq
import importlib.util
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

import numpy as np

Packer = Callable[[np.ndarray, int], int]


def padded(lengths: np.ndarray, capacity: int) -> int:
    """One sample a row."""
    return len(lengths)


def next_fit(lengths: np.ndarray, capacity: int) -> int:
    """One open row, closed by the first sample that does not fit."""
    rows, free = 0, 0
    for length in lengths.tolist():
        if length > free:
            rows, free = rows + 1, capacity
        free -= length
    return rows


def first_fit(lengths: np.ndarray, capacity: int, *, bins: int = 8) -> int:
    """A few open rows, the way of torchtitan's and Grain's loaders: into the first with room; without any, the fullest is closed."""
    free, rows = [capacity] * bins, bins
    for length in lengths.tolist():
        place = next((place for place, room in enumerate(free) if length <= room), None)
        if place is None:
            free.remove(min(free))
            free.append(capacity)
            place, rows = bins - 1, rows + 1
        free[place] -= length
    return rows - free.count(capacity)


def best_fit_decreasing(lengths: np.ndarray, capacity: int, *, window: int = 1000) -> int:
    """Of each window, the longest first into the row that it leaves least of: trl's `bfd` with its windows, our implementation."""
    rows = 0
    for part in _windows(lengths, window):
        free: list[int] = []  # ascending
        for length in sorted(part, reverse=True):
            place = bisect_left(free, length)
            rows += place == len(free)
            insort(free, (free.pop(place) if place < len(free) else capacity) - length)
    return rows


def knapsack(lengths: np.ndarray, capacity: int, *, window: int = 1000, spare: int = 5) -> int:
    """Of each window, the longest first into the row with the most room: the way of nanoVLM's balanced knapsack, our implementation.

    spare: rows open from the start beyond those that there must be at least, as its loader asks for.
    """
    rows = 0
    for part in _windows(lengths, window):
        loads = [0] * (-(-sum(part) // capacity) + spare)
        for length in sorted(part, reverse=True):
            if loads[0] + length <= capacity:
                heapq.heapreplace(loads, loads[0] + length)
            else:
                heapq.heappush(loads, length)
        rows += sum(load > 0 for load in loads)
    return rows


def trl_bfd(lengths: np.ndarray, capacity: int) -> int:
    """Count the rows of the function behind trl's `pack_dataset(strategy="bfd")`, called as that does: in windows of 1000."""
    import pyarrow
    from trl.data_utils import _pack_bfd

    tables = (pyarrow.table({"input_ids": [np.zeros(length, np.int8) for length in part]}) for part in _windows(lengths, 1000))
    return sum(len(_pack_bfd(table, capacity)) for table in tables)


def packers() -> dict[str, Packer]:
    """Name the ways to compare with, plainest first."""
    found: dict[str, Packer] = {
        "one sample a row": padded,
        "next fit": next_fit,
        "first fit, 8 rows open": first_fit,
        "knapsack of nanoVLM, 1000 (our code)": knapsack,
        "best fit decreasing, 1000 (our code)": best_fit_decreasing,
    }
    if importlib.util.find_spec("trl"):
        found["trl `bfd`, 1000"] = trl_bfd
    return found


def _windows(lengths: np.ndarray, size: int) -> Iterator[list[int]]:
    for start in range(0, len(lengths), size):
        yield lengths[start : start + size].tolist()

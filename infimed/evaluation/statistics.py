"""Intervals that respect clusters: questions on one image stand or fall together, so whole clusters are resampled.

The interval is the percentile interval of the cluster bootstrap with its tails widened for few clusters (Hesterberg's expanded percentile
interval): a plain one is as narrow as a normal interval that divides by n where Student's t with n - 1 is due.
Where every cluster agrees (all right, all wrong) the bootstrap has no spread at all and would claim certainty; the Wilson interval, with
clusters as its trials, is the floor there.
Source: T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5.3; E. B. Wilson, JASA 22, 1927.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

_BLOCK = 2_000_000  # cluster draws held in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean over n values with its confidence limits, which are None where one cluster says nothing about spread."""

    mean: float
    low: float | None
    high: float | None
    n: int  # values
    clusters: int
    method: Literal["bootstrap", "wilson", "undefined"]


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Estimate the mean of scores in [0, 1] by cluster bootstrap; None for no values. Equal input and seed give equal limits."""
    return _interval(np.asarray(values, float), clusters, floor=0.0, draws=draws, seed=seed, level=level)


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Estimate mean(a - b) of two scorings, each in [0, 1], of the same questions; pairing removes how hard a question is."""
    return _interval(np.asarray(a, float) - np.asarray(b, float), clusters, floor=-1.0, draws=draws, seed=seed, level=level)


def _interval(values: np.ndarray, clusters: Sequence[Hashable], *, floor: float, draws: int, seed: int, level: float) -> Interval | None:
    """Estimate the mean of values in [floor, 1]."""
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    if not len(values):
        return None
    number = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    of_value = np.array([number[c] for c in clusters])
    count, mean = len(number), float(values.mean())
    if count == 1:
        return Interval(mean, None, None, len(values), 1, "undefined")
    sums, sizes = np.bincount(of_value, values), np.bincount(of_value).astype(float)
    if np.ptp(sums / sizes) < 1e-12:
        low, high = (floor + (1 - floor) * limit for limit in _wilson((mean - floor) / (1 - floor), count, level))
        return Interval(mean, low, high, len(values), count, "wilson")
    means = _resampled_means(sums, sizes, draws=draws, seed=seed)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student_quantile((1 + level) / 2, count - 1))
    low, high = np.quantile(means, (tail, 1 - tail)).tolist()
    return Interval(mean, low, high, len(values), count, "bootstrap")


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Return float[draws]: the mean of each resample of as many clusters, every cluster weighing its values."""
    rng, count, means = np.random.default_rng(seed), len(sums), []
    block = max(1, _BLOCK // count)
    for start in range(0, draws, block):
        drawn = rng.integers(count, size=(min(block, draws - start), count))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    """Return the Wilson score limits of a share of n trials."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def _student_quantile(p: float, freedom: int) -> float:
    """Return Student's quantile: exact for 1 and 2 degrees of freedom, else a Cornish-Fisher series (within 0.5 % at 3 and more)."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z, v = NormalDist().inv_cdf(p), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))

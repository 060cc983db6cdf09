"""Lengths of samples that the benchmarks share: an assumed mix, not a real data set's."""

from __future__ import annotations

import numpy as np

EXTRA = 10
"""Tokens of a sample beside caption and image: the template's, and two around the image."""


def caption(count: int, *, seed: int = 20251122) -> np.ndarray:
    """Draw int64[count, 2] caption tokens (64 to 400, log-normal around 140) and image tokens (64 to 729, half of them 256 or 729)."""
    random = np.random.default_rng(seed)
    text = np.clip(np.rint(random.lognormal(np.log(140), 0.5, count)), 64, 400)
    kind = random.random(count)
    image = np.select([kind < 0.25, kind < 0.5], [256, 729], random.integers(64, 730, count))
    return np.stack([text, image], axis=1).astype(np.int64)

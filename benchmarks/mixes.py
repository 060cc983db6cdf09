"""Lengths of samples that the benchmarks share: assumed mixes, not a real data set's."""

from __future__ import annotations

import numpy as np

EXTRA = 10
"""Tokens of a sample beside caption and image: the template's, and two around the image."""

MEDICAL = ("high", "low", "hard")
"""Mixes of `medical`: images of 64 to 729 tokens; of a quarter of that; nothing but the hard half, with images of 729 throughout."""

# Of each kind: share in `high` and `low`, share in `hard`; text tokens as (median, sigma of the logarithm, least, most).
_KINDS = {
    "caption": (0.40, 0.0, (140, 0.5, 64, 400)),
    "question": (0.25, 0.0, (48, 0.6, 12, 256)),
    "several images": (0.15, 0.55, (220, 0.7, 48, 1200)),
    "reasoning": (0.15, 0.45, (2200, 0.45, 1000, 6000)),
    "text": (0.05, 0.0, (700, 0.8, 64, 4096)),
}


def caption(count: int, *, seed: int = 20251122) -> np.ndarray:
    """Draw int64[count, 2] caption tokens (64 to 400, log-normal around 140) and image tokens (64 to 729, half of them 256 or 729)."""
    random = np.random.default_rng(seed)
    text = np.clip(np.rint(random.lognormal(np.log(140), 0.5, count)), 64, 400)
    kind = random.random(count)
    image = np.select([kind < 0.25, kind < 0.5], [256, 729], random.integers(64, 730, count))
    return np.stack([text, image], axis=1).astype(np.int64)


def medical(count: int, *, mix: str, seed: int = 20251122) -> dict[str, np.ndarray]:
    """Draw the samples of a mix of `MEDICAL`: int64[count] `len`, `vis` (image tokens), `vsq` (sum of their squares by image), `nimg`.

    A sample is its text, its images with two tokens around each, and 8 of the template. Questions and captions have one image,
    reasoning none to two, and several are 2 to 12.
    """
    random = np.random.default_rng([seed, MEDICAL.index(mix)])
    kinds = random.choice(len(_KINDS), count, p=[hard if mix == "hard" else easy for easy, hard, _ in _KINDS.values()])
    median, sigma, least, most = np.array([text for _, _, text in _KINDS.values()]).T[:, kinds]
    text = np.clip(np.rint(random.lognormal(np.log(median), sigma)), least, most).astype(np.int64)
    several = np.clip(1 + random.geometric(0.4, count), 2, 12)
    reasoning = random.choice(3, count, p=[0.1, 0.8, 0.1])
    images = np.choose(kinds, [1, 1, several, reasoning, 0])
    sample = np.repeat(np.arange(count), images)
    tokens = _image_tokens(random, len(sample), mix)
    visual = np.bincount(sample, tokens, minlength=count).astype(np.int64)
    squares = np.bincount(sample, tokens**2, minlength=count).astype(np.int64)
    return {"len": text + visual + 2 * images + 8, "vis": visual, "vsq": squares, "nimg": images}


def _image_tokens(random: np.random.Generator, count: int, mix: str) -> np.ndarray:
    """Draw int64[count] tokens an image: a quarter 256, a quarter 729, the others anything from 64 to 729."""
    if mix == "hard":
        return np.full(count, 729)
    kind = random.random(count)
    tokens = np.select([kind < 0.25, kind < 0.5], [256, 729], random.integers(64, 730, count))
    return np.clip(np.rint(tokens / 4), 64, 182).astype(np.int64) if mix == "low" else tokens

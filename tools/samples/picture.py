"""A picture with everything that is known about it: what every part of the build hands to the questions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image

SIDE = 112  # pixels of a bundled picture


@dataclass(frozen=True)
class Picture:
    """Encoded bytes and facts. `facts` holds family -> true value; families that do not apply are absent."""

    data: bytes
    extension: str
    source: str
    patient: str
    licence: str
    provenance: str
    modality: str  # MR, CT, US, XR, NM, fundus, histology, fluorescence, general
    organ: str
    domain: str = "in"
    facts: Mapping[str, str] = field(default_factory=dict)


def seeded(*names: object) -> random.Random:
    """Return a generator that depends on the names alone."""
    return random.Random("/".join(str(name) for name in names))


def encode(image: Image.Image, *, quality: int = 70) -> bytes:
    """Encode as JPEG (grey stays one channel)."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def vary(values: np.ndarray, rng: random.Random) -> np.ndarray:
    """Vary contrast, brightness, shading, sharpness and noise of a picture; float[H, W] or [H, W, 3] in 0..1, the same out."""
    noise = np.random.default_rng(rng.getrandbits(32))
    values = np.clip(values, 0, 1) ** rng.uniform(0.75, 1.3)
    values = values * rng.uniform(0.75, 1.1) + rng.choice((0, 0, 0, 0, 0, rng.uniform(0, 0.1)))
    across = np.linspace(-1, 1, values.shape[1])[None, :]
    down = np.linspace(-1, 1, values.shape[0])[:, None]
    shade = 1 + rng.uniform(-0.1, 0.1) * across + rng.uniform(-0.1, 0.1) * down
    values = values * (shade if values.ndim == 2 else shade[..., None])
    return np.clip(values + noise.normal(0, rng.choice((0, 0, 0, 0.015)), values.shape), 0, 1)

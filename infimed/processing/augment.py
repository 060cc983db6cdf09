"""Random changes to a training picture that keep its size and its sides; what is drawn follows from the sample alone.

No flips and no turns, ours: left and right, and which way is up, are findings in medicine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from infimed.contracts import UserError

_LIMITS = {"brightness": 1.0, "contrast": 1.0, "shift": 0.5, "p": 1.0}


class Augment(Protocol):
    """Changes a picture as the tower will see it, already resized."""

    def __call__(self, picture: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Return a changed uint8[3, H, W] of the same size; never in place, and no other source of chance than `generator`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Another exposure and a slightly other place; with every number at 0 the picture stays as it is."""

    brightness: float = 0.0  # most that is added to or taken from every value, as a share of the range
    contrast: float = 0.0  # most that distances from the picture's mean grow or shrink by, as a share
    shift: float = 0.0  # most that the picture moves along each side, as a share of it; the edge is drawn out to where it came from
    p: float = 1.0  # share of the pictures that are changed

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises: UserError with everything that is wrong."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [
            f"- augment.{name}={value!r}: expected a number from 0 to {_LIMITS[name]:g}"
            for name, value in given.items()
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LIMITS[name]
        ]
        if problems:
            raise UserError("\n".join(problems))

    def __call__(self, picture: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Change uint8[3, H, W]."""
        if generator.random() >= self.p:
            return picture
        lighter, wider, down, right = generator.uniform(-1.0, 1.0, size=4)
        pixels_HWC = picture.permute(1, 2, 0).numpy()
        if self.brightness or self.contrast:
            table = _exposure(mean=pixels_HWC.mean(), factor=1.0 + wider * self.contrast, offset=255.0 * lighter * self.brightness)
            pixels_HWC = table.take(pixels_HWC)
        if self.shift:
            for axis, share in enumerate((down, right)):
                pixels_HWC = _moved(pixels_HWC, axis=axis, by=round(share * self.shift * pixels_HWC.shape[axis]))
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def stream(seed: int, number: int) -> np.random.Generator:
    """Return the source of chance of image `number` of the sample with this seed: independent of all others, and free to make."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, number], dtype=np.uint64)))


def _exposure(*, mean: float, factor: float, offset: float) -> np.ndarray:
    """Tabulate what becomes of each value: uint8[256]."""
    return np.rint((np.arange(256) - mean) * factor + mean + offset).clip(0, 255).astype(np.uint8)


def _moved(pixels_HWC: np.ndarray, *, axis: int, by: int) -> np.ndarray:
    """Move along an axis by whole pixels; the outermost line is repeated behind."""
    side = pixels_HWC.shape[axis]
    return pixels_HWC.take((np.arange(side) - by).clip(0, side - 1), axis=axis) if by else pixels_HWC

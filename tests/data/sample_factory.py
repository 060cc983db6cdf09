"""Makers of small samples with 8x8 images, for the tests of this folder."""

from __future__ import annotations

import random
from io import BytesIO

from PIL import Image

from infimed.contracts import Message, Sample

WORDS = [
    *("which", "plane", "is", "this", "axial", "coronal", "sagittal", "slice", "shown", "in", "the"),
    *("brain", "picture", "answer", "with", "one", "word", "yes", "no"),
]


def png(number: int) -> bytes:
    """Draw an 8x8 grey PNG that differs by number."""
    file = BytesIO()
    Image.frombytes("L", (8, 8), bytes((number * 37 + i * 3) % 256 for i in range(64))).save(file, "PNG")
    return file.getvalue()


def make_sample(number: int, *, images: int = 1, words: int = 5, source: str = "alpha", task: str = "plane") -> tuple[Sample, list[bytes]]:
    """Make a sample with a known key and its images."""
    draw = random.Random(number)
    question = "<image>" * images + " ".join(draw.choices(WORDS, k=words))
    messages = (Message("user", question), Message("assistant", draw.choice(WORDS)))
    names = tuple(f"{i}.png" for i in range(images))
    return Sample(f"s{number:05d}", messages, names, source=source, task=task, licence="CC0-1.0"), [png(number + i) for i in range(images)]


def mixed(count: int) -> list[tuple[Sample, list[bytes]]]:
    """Make samples of three sources with 0 to 2 images and 3 to 40 words."""
    kinds = ("alpha", "beta", "gamma")
    return [make_sample(n, images=n % 3, words=3 + n * 7 % 38, source=kinds[n % 3], task=("plane", "level")[n % 2]) for n in range(count)]

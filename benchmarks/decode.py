"""Encoded pictures to patches: the loader's way against plain Pillow, in one process, on one thread.

    python benchmarks/decode.py [--repeats 15]
    python benchmarks/decode.py --apart 60    # seconds: how far the loader's resize is from Pillow's, over random sizes and patterns

`plain` decodes, converts and resizes with Pillow and keeps a list of arrays; it does not even cut patches. `pillow` is ours with
Pillow's resize, as evaluation and chat read pictures. `ours` is what the loader does. Prints a JSON line a case (CPU milliseconds,
medians), then a table.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from infimed.contracts import Images
from infimed.processing.image import BICUBIC, BILINEAR, cut, decode_image, fit, patchify, resize
from infimed.processing.resolution import Resolution

SQUARE = Resolution(patch_size=14, image_size=378, visual_grid=9)
ANY = Resolution(patch_size=14, pool=2, min_visual_tokens=64, max_visual_tokens=256)

Way = Callable[[bytes, Resolution], torch.Tensor]


def draw(*, width: int, height: int, channels: int = 3, noise: float = 6.0) -> np.ndarray:
    """Draw slopes and some noise, about as hard to compress as a photograph: float[height, width(, channels)] in 0 ... 255."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([128 + 60 * np.sin(x / (37 + 9 * i)) + 50 * np.cos(y / (29 + 5 * i)) for i in range(channels)], axis=-1)
    return np.clip(slopes + np.random.default_rng(0).normal(0, noise, slopes.shape), 0, 255).squeeze()


def files() -> dict[str, tuple[bytes, Resolution]]:
    """Make the pictures of the table."""

    def encoded(pixels: np.ndarray, format: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, **({"quality": 90} if format == "JPEG" else {}))
        return file.getvalue()

    photo = encoded(draw(width=448, height=448, noise=7.5).astype(np.uint8), "JPEG")
    return {
        "JPEG 448 x 448 to a square": (photo, SQUARE),
        "JPEG 640 x 480, any aspect": (encoded(draw(width=640, height=480).astype(np.uint8), "JPEG"), ANY),
        "grey JPEG 2000 x 3000 to a square": (encoded(draw(width=2000, height=3000, channels=1).astype(np.uint8), "JPEG"), SQUARE),
        "grey PNG 512 x 512 to a square": (encoded(draw(width=512, height=512, channels=1).astype(np.uint8), "PNG"), SQUARE),
        "16-bit PNG 1024 x 1024 to a square": (encoded((draw(width=1024, height=1024, channels=1) * 16).astype(np.uint16), "PNG"), SQUARE),
        "JPEG 224 x 224 to a square (grows)": (encoded(draw(width=224, height=224).astype(np.uint8), "JPEG"), SQUARE),
    }


def plain(data: bytes, resolution: Resolution) -> torch.Tensor:
    """Read a picture as most loaders do: uint8[height, width, 3]."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint((values - values.min()) * (255 / (values.max() - values.min()))).astype(np.uint8))
    height, width = resolution.size(*image.size)
    how = BICUBIC if resolution.image_size is not None else BILINEAR
    arrays = [np.array(image.convert("RGB").resize((width, height), how))]
    return torch.from_numpy(arrays[0])


def ours(data: bytes, resolution: Resolution, *, fast: bool = True) -> torch.Tensor:
    """Read a picture as the loader does: uint8[P, patch_size ** 2 * 3]."""
    seen: Images = cut([fit(decode_image(data), resolution, fast=fast)], resolution.patch_size)
    return seen.patches


WAYS: dict[str, Way] = {"plain": plain, "pillow": lambda data, resolution: ours(data, resolution, fast=False), "ours": ours}


def check_agreement(found: dict[str, torch.Tensor], resolution: Resolution) -> None:
    """Refuse to compare the times of ways that see different pictures.

    Raises:
        AssertionError: Pillow's resize gives another value than plain Pillow, or a value of the fast one is more than 2/255 off.
    """
    expected = patchify(found["plain"].permute(2, 0, 1), resolution.patch_size).int()
    for way, most in (("pillow", 0), ("ours", 2)):
        apart = int((found[way].int() - expected).abs().max())
        assert apart <= most, f"{way} is {apart}/255 from plain, allowed {most}/255"


def measure(data: bytes, resolution: Resolution, *, repeats: int) -> dict[str, float]:
    """Time every way in turn: CPU milliseconds, medians."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way in WAYS if repeat % 2 == 0 else reversed(WAYS):
            start = time.process_time()
            WAYS[way](data, resolution)
            times[way].append(1e3 * (time.process_time() - start))
    return {way: statistics.median(values[1:]) for way, values in times.items()}  # the first time warms up


def patterns(height: int, width: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw what resizing usually meets, and what it finds hard: uint8[height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    boards = {"checkerboard": (x + y) % 2, "oblong checks": (x // 3 + y // 2) % 2}
    return {
        "photo": draw(width=width, height=height).reshape(height, width, 3).astype(np.uint8),
        "noise": random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "black and white noise": (random.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8),
        **{name: np.repeat((board * 255).astype(np.uint8)[..., None], 3, axis=2) for name, board in boards.items()},
    }


def apart(seconds: float) -> None:
    """Print how many values of the fast resize are 1, 2, ... of 255 from Pillow's, over random sizes, a third of which grow."""
    random, end = np.random.default_rng(0), time.time() + seconds
    counts = defaultdict[tuple[str, str], np.ndarray](lambda: np.zeros(256, np.int64))
    while time.time() < end:
        height, width = (14 * int(side) for side in random.integers(4, 45, 2))
        tall, wide = (int(side * 2 ** random.uniform(-1, 2)) for side in (height, width))
        for pattern, pixels in patterns(tall, wide, random).items():
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            for how in (BICUBIC, BILINEAR):
                exact, fast = (resize(image, height, width, how, fast=fast).int() for fast in (False, True))
                counts[how.name.lower(), pattern] += np.bincount((exact - fast).abs().flatten().numpy(), minlength=256)
    for (name, pattern), count in counts.items():
        off = {f"{step}/255": float(f"{count[step] / count.sum():.2g}") for step in np.flatnonzero(count).tolist() if step}
        print(json.dumps({"resize": name, "pattern": pattern, "values": int(count.sum()), "share_off_by": off}))


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--apart", type=float, help="seconds; measure differences instead of times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.apart:
        apart(arguments.apart)
        return
    lines = [
        "| picture | KB | plain ms | ours on Pillow ms | ours ms | plain / on Pillow | plain / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (data, resolution) in files().items():
        check_agreement({way: run(data, resolution) for way, run in WAYS.items()}, resolution)
        found = measure(data, resolution, repeats=arguments.repeats)
        print(json.dumps({"picture": name, "kilobytes": round(len(data) / 1e3), **found}), flush=True)
        ratios = " | ".join(f"{found['plain'] / found[way]:.2f}" for way in ("pillow", "ours"))
        lines.append(f"| {name} | {len(data) / 1e3:.0f} | " + " | ".join(f"{found[way]:.2f}" for way in WAYS) + f" | {ratios} |")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"\ntorch {torch.__version__} ({capability}), Pillow {Image.__version__}, one thread\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
